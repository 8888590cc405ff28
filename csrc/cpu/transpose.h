// Copies with conversion: of a row of any step, and of a matrix to its transpose.
#pragma once

#include "simd.h"

namespace ghl::cpu {
namespace {

template <class In, class T>
inline void convert(const In* from, int64_t step, T* to, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * step]);
  }
}

// a0 b0 a1 b1 ... of the lower halves, then of the upper halves.
template <class T>
inline void interleave(Vector<T> a, Vector<T> b, Vector<T>& lower, Vector<T>& upper) {
  constexpr int lanes = kLanes<T>;
  Lanes<T> low, high;
  for (int i = 0; i < lanes; ++i) {
    low[i] = i / 2 + (i % 2 ? lanes : 0);
    high[i] = low[i] + lanes / 2;
  }
  lower = __builtin_shuffle(a, b, low);
  upper = __builtin_shuffle(a, b, high);
}

// A square block: interleaving row i with row i + lanes / 2, log2(lanes) times, transposes it.
template <class In, class T>
inline void transpose_block(const In* from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int lanes = kLanes<T>;
  Vector<T> rows[lanes], next[lanes];
  for (int i = 0; i < lanes; ++i) {
    T row[lanes];
    convert(from + i * from_stride, 1, row, lanes);
    rows[i] = load(row);
  }
  for (int stage = 1; stage < lanes; stage *= 2) {
    for (int i = 0; i < lanes / 2; ++i)
      interleave<T>(rows[i], rows[i + lanes / 2], next[2 * i], next[2 * i + 1]);
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
  for (int i = 0; i < lanes; ++i) store(to + i * to_stride, rows[i]);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns.
template <class In, class T>
void transpose(const In* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
               int64_t to_stride) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < rows; i += lanes)
    for (int64_t j = 0; j < columns; j += lanes) {
      const In* block = from + i * from_stride + j;
      T* out = to + j * to_stride + i;
      if (i + lanes <= rows && j + lanes <= columns) {
        transpose_block(block, from_stride, out, to_stride);
        continue;
      }
      for (int64_t b = 0; b < minimum(lanes, columns - j); ++b)
        convert(block + b, from_stride, out + b * to_stride, minimum(lanes, rows - i));
    }
}

}  // namespace
}  // namespace ghl::cpu
