// The layers of test_sm90_dual_wgrad.cpp on a GPU, without Python. Built with
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -c tests/csrc/sm90_on_gpu.cu
//   g++ -std=c++20 -DGHL_ON_GPU -pthread tests/csrc/test_sm90_dual_wgrad.cpp sm90_on_gpu.o
//     -L/usr/local/cuda/lib64 -lcudart_static -ldl -lrt
// and run under `timeout 60`: at first built with -DGHL_WAIT_LIMIT=1000000 for nvcc, one layer by
// its number; then all; then all under compute-sanitizer.
#include <cstring>
#include <memory>
#include <vector>

#include "../../csrc/cuda/sm90_dual_wgrad.cu"
#include "sm90_on_gpu.h"

namespace ghl::cuda {
namespace {

// Memory of the GPU that holds a copy of the host's.
class Copied {
 public:
  template <class T>
  Copied(T*& pointer, size_t bytes) : host_(pointer), bytes_(pointer ? bytes : 0) {
    if (!bytes_) return;
    cudaMalloc(&device_, bytes_);
    cudaMemcpy(device_, host_, bytes_, cudaMemcpyHostToDevice);
    pointer = static_cast<T*>(device_);
  }
  ~Copied() { cudaFree(device_); }
  Copied(const Copied&) = delete;
  void poison() { cudaMemset(device_, 0xff, bytes_); }
  void fetch() { cudaMemcpy(const_cast<void*>(host_), device_, bytes_, cudaMemcpyDeviceToHost); }
  // Whether the host's copy, fetched from a run before, is the same to the bit.
  bool same() const {
    std::vector<char> now(bytes_);
    cudaMemcpy(now.data(), device_, bytes_, cudaMemcpyDeviceToHost);
    return bytes_ == 0 || std::memcmp(now.data(), host_, bytes_) == 0;
  }

 private:
  const void* host_;
  size_t bytes_;
  void* device_ = nullptr;
};

}  // namespace

const char* run_sm90_on_gpu(DualWgradParams p, size_t x_bytes, size_t signal_bytes, int tile) {
  const size_t neurons = size_t(p.splits) * p.groups * p.neurons * 4;
  const size_t weights = neurons * p.channels * p.kernel_h * p.kernel_w, rows = size_t(p.rows) * 4;
  Copied x(p.x.data, x_bytes), y(p.y.data, signal_bytes), g(p.g.data, signal_bytes);
  Copied largest(p.statistics.largest, rows), inverse(p.statistics.inverse, rows);
  Copied winner(p.statistics.winner, rows);
  Copied G(p.G, weights), H0(p.H0, weights), u_sums(p.u_sums, neurons);
  std::vector<char> nothing(
      p.exchange ? sm90_exchange_bytes(p.neurons, p.splits, p.rows_per_split) : 0, char(0xff));
  if (p.exchange) p.exchange = nothing.data();
  Copied exchange(p.exchange, nothing.size());
  for (int run = 0; run < 20; ++run) {
    for (Copied* written : {&G, &H0, &u_sums, &exchange}) written->poison();
    cudaError_t error = launch_sm90_dual_wgrad(p, tile, nullptr);
    if (error == cudaSuccess) error = cudaDeviceSynchronize();
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (run == 0) G.fetch(), H0.fetch(), u_sums.fetch();
    if (!G.same() || !H0.same() || !u_sums.same()) return "a repeat gave other numbers";
  }
  return nullptr;
}

}  // namespace ghl::cuda
