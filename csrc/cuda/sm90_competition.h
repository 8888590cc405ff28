// u in the place of y, in a swizzled box of shared memory: device code that runs on a host too.
//
// A lane has a whole row of a box in registers. Eight lanes next to each other have eight rows, and
// meet different banks by the swizzle.
#pragma once

#include "competition.h"
#include "sm90.h"
#include "sm90_layout.h"

namespace ghl::cuda::sm90 {

struct RowStatistics {
  float largest, inverse;
  int32_t winner;
};

// A row of a box, two neurons a register.
struct Row {
  uint32_t pairs[kNeurons / 2];

  GHL_DEVICE static uint4* chunk(char* box, int row, int i) {
    return reinterpret_cast<uint4*>(box + swizzled(row, i));
  }
  GHL_DEVICE void load(char* box, int row) {
    GHL_UNROLL
    for (int i = 0; i < kNeurons / 8; ++i) {
      const uint4 numbers = *chunk(box, row, i);
      pairs[4 * i] = numbers.x, pairs[4 * i + 1] = numbers.y;
      pairs[4 * i + 2] = numbers.z, pairs[4 * i + 3] = numbers.w;
    }
  }
  GHL_DEVICE void store(char* box, int row) const {
    GHL_UNROLL
    for (int i = 0; i < kNeurons / 8; ++i)
      *chunk(box, row, i) = {pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]};
  }
  template <class T>
  GHL_DEVICE float number(int i, T) const {
    const float2 both = unpack(pairs[i / 2], T{});
    return i % 2 ? both.y : both.x;
  }
  // Minus infinity from neuron `count` on, in whole chunks: what a layer does not have.
  template <class T>
  GHL_DEVICE void cut(int count, T) {
    GHL_UNROLL
    for (int i = 0; i < kNeurons / 2; i += 4) {
      if (2 * i < count) continue;
      GHL_UNROLL
      for (int j = 0; j < 4; ++j) pairs[i + j] = pack(-INFINITY, -INFINITY, T{});
    }
  }
  // The largest number; a number rather than NaN.
  template <class T>
  GHL_DEVICE float largest(T) const {
    uint32_t four[4] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    GHL_UNROLL
    for (int i = 4; i < kNeurons / 2; ++i) four[i % 4] = larger(four[i % 4], pairs[i], T{});
    const float2 both =
        unpack(larger(larger(four[0], four[1], T{}), larger(four[2], four[3], T{}), T{}), T{});
    return fmaxf(both.x, both.y);
  }
  // The first of those that are the largest; INT32_MAX if there is none.
  template <class T>
  GHL_DEVICE int32_t winner(float largest, T) const {
    int32_t first = INT32_MAX;
    GHL_UNROLL
    for (int i = kNeurons - 1; i >= 0; --i)
      if (number(i, T{}) == largest) first = i;
    return first;
  }
};

GHL_DEVICE float sum_of(const float (&numbers)[kNeurons]) {
  float sums[4] = {};
  GHL_UNROLL
  for (int i = 0; i < kNeurons; ++i) sums[i % 4] += numbers[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// From y to u. `neuron` is the row's first among the layer's. `of` is what is known of the row:
// all, or, if it is to be found here, nothing. `there`: whether the layer has this row.
template <class T, Competition COMPETITION>
GHL_DEVICE void compete_in_row(Row& row, RowStatistics of, bool find, bool there, int32_t neuron,
                               float scale) {
  constexpr bool kHard = COMPETITION == Competition::hard;
  if (find) of.largest = row.largest(T{});
  if (find && COMPETITION != Competition::softmax) of.winner = row.winner(of.largest, T{});
  const float top = finite_or_zero(of.largest);
  float power[kNeurons];
  GHL_UNROLL
  for (int i = 0; i < kNeurons; ++i) {
    const float y = row.number(i, T{});
    power[i] = kHard ? (y != y ? y : 0.0f) : exp2_approximate((y - top) * scale);
  }
  if (find) {
    const float total = sum_of(power);
    of.inverse = inverse_of(kHard ? 1.0f + total : total, of.largest, COMPETITION);
  }
  if (!there) of.inverse = 0.0f;
  const int32_t winner = of.winner - neuron;
  GHL_UNROLL
  for (int i = 0; i < kNeurons; i += 2)
    row.pairs[i / 2] = pack(share_of(power[i], of.inverse, winner == i, COMPETITION),
                            share_of(power[i + 1], of.inverse, winner == i + 1, COMPETITION), T{});
}

}  // namespace ghl::cuda::sm90
