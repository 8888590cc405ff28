// u and the statistics that it needs, from swizzled boxes of y: device code that runs on a host
// too.
#pragma once

#include "competition.h"
#include "sm90.h"
#include "sm90_layout.h"

namespace ghl::cuda::sm90 {

// The statistics of a row of y that lies whole in the boxes. A lane has a row to itself: lanes next
// to each other meet different banks by the swizzle. `neurons` is a multiple of 8.
template <class T, Competition COMPETITION>
GHL_DEVICE RowStatistics find_statistics(const char* y, int row, int32_t neurons, float scale,
                                         int32_t& winner) {
  const auto chunk_of = [&](int chunk) {
    return *reinterpret_cast<const uint4*>(y + chunk / 8 * kBoxBytes + swizzled(row, chunk % 8));
  };
  uint32_t pair = pack(-INFINITY, -INFINITY, T{});
  for (int chunk = 0; chunk < neurons / 8; ++chunk) {
    const uint4 numbers = chunk_of(chunk);
    pair = larger(pair, larger(numbers.x, numbers.y, T{}), T{});
    pair = larger(pair, larger(numbers.z, numbers.w, T{}), T{});
  }
  const float2 halves = unpack(pair, T{});
  const float largest = fmaxf(halves.x, halves.y);
  const float top = finite_or_zero(largest);
  float total = COMPETITION == Competition::hard ? 1.0f : 0.0f;
  winner = INT32_MAX;
  for (int chunk = 0; chunk < neurons / 8; ++chunk) {
    const uint4 numbers = chunk_of(chunk);
    const uint32_t pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
    GHL_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float2 both = unpack(pairs[i / 2], T{});
      const float number = i % 2 ? both.y : both.x;
      if (COMPETITION != Competition::hard)
        total += exp2_approximate((number - top) * scale);
      else if (number != number)
        total = number;
      if (COMPETITION != Competition::softmax && number == largest && winner == INT32_MAX)
        winner = chunk * 8 + i;
    }
  }
  return {largest, inverse_of(total, largest, COMPETITION)};
}

// The numbers of 16 neurons by 16 rows, first operand of a product, from y to u. `neuron` is the
// first of the 16 among all of the layer, `row` the first in the stage.
template <class T, Competition COMPETITION>
GHL_DEVICE void make_u(uint32_t (&fragment)[4], const RowPair* statistics, const WinnerPair* winner,
                       int lane, int row, int32_t neuron, float scale) {
  GHL_UNROLL
  for (int upper_rows = 0; upper_rows < 2; ++upper_rows) {
    const int pair = row / 2 + lane % 4 + upper_rows * 4;
    const RowPair of = statistics[pair];
    WinnerPair first = {};
    if (COMPETITION != Competition::softmax) first = winner[pair];
    GHL_UNROLL
    for (int upper_neurons = 0; upper_neurons < 2; ++upper_neurons) {
      const int32_t k = neuron + lane / 4 + upper_neurons * 8;
      uint32_t& numbers = fragment[2 * upper_rows + upper_neurons];
      const float2 y = unpack(numbers, T{});
      numbers = pack(
          compete(y.x, of.row[0].largest, of.row[0].inverse, first.row[0] == k, scale, COMPETITION),
          compete(y.y, of.row[1].largest, of.row[1].inverse, first.row[1] == k, scale, COMPETITION),
          T{});
    }
  }
}

}  // namespace ghl::cuda::sm90
