// Launches the kernels of merge.h. Their table of layers travels in the kernel's arguments, of
// which there may be 32,764 bytes; a smaller table is cheaper to launch.
#include <algorithm>

#include "launch.h"
#include "merge.h"

namespace ghl::cuda {
namespace {

constexpr int kFewLayers = 40, kManyLayers = 340;
static_assert(sizeof(MergeTable<kFewLayers>) <= 4096 && sizeof(MergeTable<kManyLayers>) <= 32764);

// How many blocks the GPU runs at once: a cooperative launch may have no more.
cudaError_t resident_blocks(const void* kernel, int& blocks) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kMergeThreads,
                                                          merge_shared_bytes(kMergeThreads));
  blocks *= processors;
  return error;
}

cudaError_t launch_alone(const MergeLayer* layer, int32_t, Decay decay, Gate gate,
                         Normalize normalize, cudaStream_t stream) {
  const auto table = table_of<1>(layer, 1, decay, gate, normalize);
  const int32_t tasks[] = {measure_tasks(*layer, kMergeThreads),
                           combine_tasks(*layer, kMergeThreads)};
  constexpr void (*kernels[])(MergeTable<1>) = {measure_kernel, combine_kernel};
  for (int i = 0; i < 2; ++i) {
    // each block of the second looks at all neurons: no more blocks than the GPU runs at once
    int resident = 0;
    const cudaError_t error = resident_blocks(reinterpret_cast<const void*>(kernels[i]), resident);
    if (error != cudaSuccess) return error;
    const unsigned blocks = unsigned(std::min(tasks[i], resident));
    kernels[i]<<<blocks, kMergeThreads, merge_shared_bytes(kMergeThreads), stream>>>(table);
  }
  return cudaGetLastError();
}

template <int CAPACITY>
cudaError_t launch(const MergeLayer* layers, int32_t count, Decay decay, Gate gate,
                   Normalize normalize, cudaStream_t stream) {
  auto table = table_of<CAPACITY>(layers, count, decay, gate, normalize);
  int64_t measured = 0, combined = 0;
  for (int32_t i = 0; i < count; ++i) {
    measured += measure_tasks(layers[i], kMergeThreads);
    combined += combine_tasks(layers[i], kMergeThreads);
  }
  const auto kernel = reinterpret_cast<const void*>(merge_kernel<CAPACITY>);
  int resident = 0;
  const cudaError_t error = resident_blocks(kernel, resident);
  if (error != cudaSuccess) return error;
  const int64_t useful = std::max({measured, combined, int64_t(count)});
  void* arguments[] = {&table};
  const auto try_blocks = [&](int64_t blocks) {
    return cudaLaunchCooperativeKernel(kernel, unsigned(blocks), kMergeThreads, arguments,
                                       merge_shared_bytes(kMergeThreads), stream);
  };
  int64_t blocks = std::min<int64_t>(useful, resident);
  cudaError_t launched = try_blocks(blocks);
  // a stream may have only a part of the GPU; the result does not depend on the blocks
  while (launched == cudaErrorCooperativeLaunchTooLarge && blocks > 1) {
    cudaGetLastError();
    launched = try_blocks(blocks /= 2);
  }
  return launched;
}

}  // namespace

cudaError_t launch_merge(const MergeLayer* layers, int32_t count, Decay decay, Gate gate,
                         Normalize normalize, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  while (count > 0 && error == cudaSuccess) {
    const int32_t now = std::min(count, kManyLayers);
    const auto launch_table = now == 1            ? launch_alone
                              : now <= kFewLayers ? launch<kFewLayers>
                                                  : launch<kManyLayers>;
    error = launch_table(layers, now, decay, gate, normalize, stream);
    layers += now, count -= now;
  }
  return error;
}

}  // namespace ghl::cuda
