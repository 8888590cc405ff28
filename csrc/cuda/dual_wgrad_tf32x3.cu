#include "dual_wgrad_launch.h"

template struct ghl::cuda::DualWgradLaunches<float, ghl::cuda::Precision::tf32x3>;
