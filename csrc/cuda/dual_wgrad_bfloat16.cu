#include "dual_wgrad_launch.h"

template struct ghl::cuda::DualWgradLaunches<ghl::cuda::bfloat16, ghl::cuda::Precision::tf32>;
