// What Python and a compiled library have to agree on.
#pragma once

#define GHL_EXPORT extern "C" __attribute__((visibility("default")))

// The version of what crosses the seam: the overloads for libraries in ghl_kernels/ops.py and the
// exported functions. It grows with every change of them, in ghl_kernels/library.py too.
#define GHL_ABI 4
