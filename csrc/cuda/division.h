// Division by what a launch knows: a multiplication and a shift instead of a routine.
#pragma once

#include "device.h"

namespace ghl::cuda {

// Division of 0 <= n < 2^31 by a constant of the launch, as multiplication and shift.
struct Division {
  uint32_t divisor, multiplier, shift;

  static Division by(int32_t divisor) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const uint64_t gap = (uint64_t{1} << shift) - uint64_t(divisor);
    return {uint32_t(divisor), uint32_t((gap << 32) / uint64_t(divisor) + 1), shift};
  }
  GHL_HOST_DEVICE uint32_t of(uint32_t n) const {
    return uint32_t((uint64_t(n) * multiplier >> 32) + n) >> shift;
  }
};

}  // namespace ghl::cuda
