// Which kernels were compiled, and which of them this processor can run, the fastest first.
//
// GHL_X86 is defined by CMake where the x86 instruction sets were compiled.
#pragma once

#include <vector>

#include "kernels.h"

namespace ghl::cpu {

extern const Kernels kernels_generic;
#ifdef GHL_X86
extern const Kernels kernels_avx2, kernels_avx512;
#endif

inline std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef GHL_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd"))
    usable.push_back(&kernels_avx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
    usable.push_back(&kernels_avx2);
#endif
  usable.push_back(&kernels_generic);
  return usable;
}

}  // namespace ghl::cpu
