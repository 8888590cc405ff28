// Launches the kernel of split_k.h.
#include "launch.h"
#include "split_k.h"

namespace ghl::cuda {

cudaError_t launch_sum_splits(const SumSplitsParams& p, cudaStream_t stream) {
  const SumSplitsArguments a = sum_splits_arguments(p);
  const dim3 grid = sum_splits_grid(a, kSumThreads);
  if (grid.x == 0) return cudaSuccess;
  sum_splits_kernel<<<grid, kSumThreads, sum_splits_shared_bytes(kSumThreads), stream>>>(a);
  return cudaGetLastError();
}

}  // namespace ghl::cuda
