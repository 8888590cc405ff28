// Products of fragments on the tensor cores: of 16-bit numbers as they are; of float32 as one of
// TF32 or, to the accuracy of float32, as three.
#pragma once

#include "device.h"
#include "params.h"

namespace ghl::cuda {

// float32 as a TF32 and what that leaves, which together hold all its bits; an infinity or NaN
// leaves nothing.
template <int N>
GHL_DEVICE void split(uint32_t (&high)[N], uint32_t (&low)[N], const uint32_t (&x)[N]) {
  GHL_UNROLL
  for (int i = 0; i < N; ++i) {
    high[i] = round_to_tf32(bits_to_float(x[i]));
    const float left = bits_to_float(x[i]) - bits_to_float(high[i]);
    low[i] = left == left ? round_to_tf32(left) : 0;
  }
}

// An infinity times what the other number leaves would be one of either sign.
template <int N>
GHL_DEVICE void keep_finite(uint32_t (&finite)[N], const uint32_t (&high)[N]) {
  GHL_UNROLL
  for (int i = 0; i < N; ++i) finite[i] = (~high[i] & 0x7f800000) ? high[i] : 0;
}

template <Precision PRECISION>
GHL_DEVICE void add_product_of_floats(float (&sums)[4], const uint32_t (&high_a)[4],
                                      const uint32_t (&low_a)[4], const uint32_t (&b)[2]) {
  uint32_t high_b[2], low_b[2];
  split(high_b, low_b, b);
  if constexpr (PRECISION == Precision::tf32) {
    multiply_add(sums, high_a, high_b, float{});
  } else {
    // Tensor cores round toward zero: what is kept for long is added outside of them.
    float part[4] = {};
    uint32_t finite_a[4], finite_b[2];
    keep_finite(finite_a, high_a);
    keep_finite(finite_b, high_b);
    multiply_add(part, low_a, finite_b, float{});
    multiply_add(part, finite_a, low_b, float{});
    multiply_add(part, high_a, high_b, float{});
    GHL_UNROLL
    for (int i = 0; i < 4; ++i) sums[i] += part[i];
  }
}

// Two mma's whose first operand is the same; T is the type of the numbers in the fragments.
template <Precision PRECISION, class T>
GHL_DEVICE void add_products(float (&first)[4], float (&second)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2][2], T type) {
  if constexpr (sizeof(T) == 2) {
    multiply_add(first, a, b[0], type);
    multiply_add(second, a, b[1], type);
  } else {
    uint32_t high_a[4], low_a[4];
    split(high_a, low_a, a);
    add_product_of_floats<PRECISION>(first, high_a, low_a, b[0]);
    add_product_of_floats<PRECISION>(second, high_a, low_a, b[1]);
  }
}

}  // namespace ghl::cuda
