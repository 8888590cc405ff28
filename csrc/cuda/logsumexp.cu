// Launches the kernels of logsumexp.h.
#include "launch.h"
#include "logsumexp.h"

namespace ghl::cuda {

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const StatisticsArguments a = statistics_arguments(p, kStatisticsThreads);
  const auto launch = [&](auto type, auto wide, auto competition) {
    const auto kernel = statistics_kernel<decltype(type), competition.value, wide.value>;
    kernel<<<unsigned(statistics_blocks(a, kStatisticsThreads)), kStatisticsThreads,
             statistics_shared_bytes(a, kStatisticsThreads), stream>>>(a);
    return cudaGetLastError();
  };
  return with_statistics_kernel(a, cudaErrorInvalidValue, launch);
}

}  // namespace ghl::cuda
