// The launchers of csrc/cuda/launch.h on the host, and no GPU's runtime: with csrc/cuda/library.cpp
// and under the key CPU they are a library that tests of the Python side load.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <type_traits>

#include "../../csrc/cuda/dual_wgrad.h"
#include "../../csrc/cuda/logsumexp.h"
#include "../../csrc/cuda/merge.h"
#include "../../csrc/cuda/split_k.h"

// Of CUDA's headers, which cannot be here beside the emulation, what launch.h needs.
enum cudaError { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaError_t = cudaError;
using cudaStream_t = struct CUstream_st*;

namespace ghl::cuda {
namespace {

constexpr unsigned kResidentBlocks = 3;  // of a cooperative launch

template <class F>
auto with_types(Dtype dtype, Precision precision, F&& f) {
  if (dtype == Dtype::bfloat16)
    return f(bfloat16{}, std::integral_constant<Precision, Precision::tf32>{});
  if (dtype == Dtype::float16)
    return f(float16{}, std::integral_constant<Precision, Precision::tf32>{});
  if (precision == Precision::tf32)
    return f(float{}, std::integral_constant<Precision, Precision::tf32>{});
  return f(float{}, std::integral_constant<Precision, Precision::tf32x3>{});
}

}  // namespace

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t) {
  const StatisticsArguments a = statistics_arguments(p, kStatisticsThreads);
  return with_statistics_kernel(
      a, cudaErrorInvalidValue, [&](auto type, auto wide, auto competition) {
        emulation::launch({unsigned(statistics_blocks(a, kStatisticsThreads))}, kStatisticsThreads,
                          statistics_shared_bytes(a, kStatisticsThreads), [&] {
                            statistics_kernel<decltype(type), competition.value, wide.value>(a);
                          });
        return cudaSuccess;
      });
}

cudaError_t launch_sum_splits(const SumSplitsParams& p, cudaStream_t) {
  const SumSplitsArguments a = sum_splits_arguments(p);
  emulation::launch(sum_splits_grid(a, kSumThreads), kSumThreads,
                    sum_splits_shared_bytes(kSumThreads), [&] { sum_splits_kernel(a); });
  return cudaSuccess;
}

template <int CAPACITY>
void merge_layers(const MergeLayer* layers, int32_t count, Decay decay, Gate gate,
                  Normalize normalize) {
  const auto table = table_of<CAPACITY>(layers, count, decay, gate, normalize);
  const auto run = [&](const std::function<void()>& kernel) {
    emulation::launch({kResidentBlocks}, kMergeThreads, merge_shared_bytes(kMergeThreads), kernel,
                      true);
  };
  if constexpr (CAPACITY == 1)
    run([&] { measure_kernel(table); }), run([&] { combine_kernel(table); });
  else
    run([&] { merge_kernel<CAPACITY>(table); });
}

cudaError_t launch_merge(const MergeLayer* layers, int32_t count, Decay decay, Gate gate,
                         Normalize normalize, cudaStream_t) {
  constexpr int capacity = 40;
  for (; count > 0; layers += capacity, count -= capacity) {
    if (count == 1)
      merge_layers<1>(layers, 1, decay, gate, normalize);
    else
      merge_layers<capacity>(layers, std::min(count, capacity), decay, gate, normalize);
  }
  return cudaSuccess;
}

Tile dual_wgrad_tile(int number, Dtype dtype, Precision precision, bool pointwise) {
  return with_types(dtype, precision, [&](auto type, auto of) {
    return with_shape<decltype(type), of.value>(number, pointwise, Tile{},
                                                [](auto shape) { return shape.tile(); });
  });
}

cudaError_t launch_dual_wgrad(const DualWgradParams& p, int number, cudaStream_t) {
  return with_types(p.dtype, p.precision, [&](auto type, auto of) {
    return with_shape<decltype(type), of.value>(
        number, is_pointwise(p), cudaErrorInvalidValue, [&](auto shape) {
          const Tile tile = shape.tile();
          const DualWgradArguments a = dual_wgrad_arguments(p, tile.columns);
          emulation::launch(dual_wgrad_grid(a, tile), tile.threads, tile.shared_bytes,
                            [&] { dual_wgrad_kernel<decltype(shape)>(a); });
          return cudaSuccess;
        });
  });
}

}  // namespace ghl::cuda

// The runtime and PyTorch's streams and devices, of which a host has none.
extern "C" {
cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) {
  return "an error";
}
const char* cudaGetErrorString(cudaError_t) {
  return "of the emulation";
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle*) {
  return 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  return 0;
}
}
