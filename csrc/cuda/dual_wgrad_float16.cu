#include "dual_wgrad_launch.h"

template struct ghl::cuda::DualWgradLaunches<ghl::cuda::float16, ghl::cuda::Precision::tf32>;
