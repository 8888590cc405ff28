// What test_sm90_dual_wgrad.cpp, compiled for the host, calls to run a layer on a GPU.
#pragma once

#include <cstddef>

#include "../../csrc/cuda/params.h"

namespace ghl::cuda {

// Runs the kernel, repeatedly, on copies of what the parameters point to on the host; the sums come
// back into their places there. Null, or what went wrong.
const char* run_sm90_on_gpu(DualWgradParams, size_t x_bytes, size_t signal_bytes, int tile);

}  // namespace ghl::cuda
