// Which kernels were compiled, and the fastest of them that this processor can run.
//
// GHL_X86 is defined by CMake where the x86 instruction sets were compiled.
#pragma once

#include "kernels.h"

namespace ghl::cpu {

extern const Kernels kernels_generic;
#ifdef GHL_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif

inline const Kernels& fastest_kernels() {
#ifdef GHL_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd"))
    return kernels_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    return kernels_avx2;
#endif
  return kernels_generic;
}

}  // namespace ghl::cpu
