// The CUDA library: for now only what it was built for, so that its build and loading are proven.
//
// Kernels register here as further `.native` implementations, under the CUDA key.
#include <cuda_runtime_api.h>

#define GHL_STRING_(x) #x
#define GHL_STRING(x) GHL_STRING_(x)

extern "C" __attribute__((visibility("default"))) const char* ghl_kernels_cuda_architectures() {
  return GHL_CUDA_ARCHITECTURES;
}

// The CUDA runtime the library was compiled with, as 1000 * major + 10 * minor.
extern "C" __attribute__((visibility("default"))) int ghl_kernels_cuda_version() {
  return CUDART_VERSION;
}
