// What every compiled library says of itself, so that Python can tell one that it must not call.
#pragma once

#define GHL_EXPORT extern "C" __attribute__((visibility("default")))

// The version of what crosses the seam: the `.native` and `.cuda` overloads of ghl_kernels/ops.py
// and the exported functions. It grows with every change of them, in ghl_kernels/library.py too.
#define GHL_ABI 2

#define GHL_DESCRIBE_LIBRARY          \
  GHL_EXPORT int ghl_kernels_abi() {  \
    return GHL_ABI;                   \
  }                                   \
  GHL_EXPORT const char* ghl_kernels_source_hash() { \
    return GHL_SOURCE_HASH;           \
  }
