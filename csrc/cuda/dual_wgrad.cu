// Picks the dual weight gradient of a dtype and precision; the shapes are dual_wgrad_shape.h's.
#include "dual_wgrad_launch.h"

namespace ghl::cuda {

extern template struct DualWgradLaunches<bfloat16, Precision::tf32>;
extern template struct DualWgradLaunches<float16, Precision::tf32>;
extern template struct DualWgradLaunches<float, Precision::tf32>;
extern template struct DualWgradLaunches<float, Precision::tf32x3>;

namespace {

template <class F>
auto with_launches(Dtype dtype, Precision precision, F&& f) {
  if (dtype == Dtype::bfloat16) return f(DualWgradLaunches<bfloat16, Precision::tf32>{});
  if (dtype == Dtype::float16) return f(DualWgradLaunches<float16, Precision::tf32>{});
  if (precision == Precision::tf32) return f(DualWgradLaunches<float, Precision::tf32>{});
  return f(DualWgradLaunches<float, Precision::tf32x3>{});
}

}  // namespace

Tile dual_wgrad_tile(int number, Dtype dtype, Precision precision, bool pointwise) {
  return with_launches(dtype, precision,
                       [&](auto launches) { return launches.tile(number, pointwise); });
}

cudaError_t launch_dual_wgrad(const DualWgradParams& p, int tile, cudaStream_t stream) {
  return with_launches(p.dtype, p.precision,
                       [&](auto launches) { return launches.launch(p, tile, stream); });
}

}  // namespace ghl::cuda
