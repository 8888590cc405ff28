// What every compiled library offers to Python beside its operators' implementations.
//
// Loading one registers nothing: Python asks for its version first. PyTorch would end the process
// over an implementation of an operator that this Python does not have.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "abi.h"

// `fill` registers the implementations for the dispatch key; called once.
#define GHL_DESCRIBE_LIBRARY(key, fill)                                                            \
  GHL_EXPORT int ghl_kernels_abi() {                                                               \
    return GHL_ABI;                                                                                \
  }                                                                                                \
  GHL_EXPORT const char* ghl_kernels_source_hash() {                                               \
    return GHL_SOURCE_HASH;                                                                        \
  }                                                                                                \
  GHL_EXPORT void ghl_kernels_register() {                                                         \
    using namespace torch::stable::detail;                                                         \
    static const StableTorchLibraryInit init(StableLibrary::Kind::IMPL, &fill, "ghl_kernels", key, \
                                             __FILE__, __LINE__);                                  \
  }

namespace ghl {

// Whether the numbers of a tensor, in whatever order, fill its memory.
inline bool is_gapless(const torch::stable::Tensor& t) {
  int64_t reach = 1;
  for (int64_t d = 0; d < t.dim(); ++d) reach += (t.size(d) - 1) * t.stride(d);
  return t.numel() == 0 || reach == t.numel();
}

}  // namespace ghl
