// out (+)= signalᵀ panel for a few neurons and one panel of columns, over the rows of a tile.
//
// Costs 2 * rows * neurons * columns FLOPs; reads rows * (neurons + columns) elements from the
// first two cache levels and makes neurons * columns sums, which stay in registers meanwhile.
// For tiles of kTileRows rows; 12 x 2 accumulators of AVX-512's 32 registers, else 6 x 2 of 16.
#pragma once

#include "patches.h"
#include "signals.h"

namespace ghl::cpu {
namespace {

constexpr int kMicroNeurons = GHL_VECTOR_BYTES == 64 ? 12 : 6;
// The sums of a microtile are asked for a vector at a time, this many rows apart: all at once they
// would hold up the loads that the next rows need.
constexpr int64_t kPrefetchRows = 8;

// `sums` is the microtile's own (neurons, columns) block, with nothing between its rows; with `add`
// the products are added to what is there.
template <class T, int Neurons, int Vectors>
void multiply(int64_t rows, const T* signal, const T* panel, T* sums, int64_t neurons,
              int64_t columns, bool add) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>, width = Vectors * lanes;
  V products[Neurons][Vectors] = {};
  for (int64_t m = 0; m < rows; ++m) {
    if (m % kPrefetchRows == 0 && m < kPrefetchRows * Neurons * Vectors)
      __builtin_prefetch(sums + m / kPrefetchRows * lanes, 1);
    V x[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) x[v] = load(panel + m * width + v * lanes);
#pragma GCC unroll 12
    for (int k = 0; k < Neurons; ++k) {
      const V s = broadcast(signal[k * kNeuronStride + m]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) products[k][v] += s * x[v];
    }
  }
  for (int k = 0; k < minimum(Neurons, neurons); ++k, sums += columns) {
    if (columns == width) {
      for (int v = 0; v < Vectors; ++v) {
        const V product = products[k][v];
        store(sums + v * lanes, add ? load(sums + v * lanes) + product : product);
      }
    } else {
      T row[width];
      for (int v = 0; v < Vectors; ++v) store(row + v * lanes, products[k][v]);
      for (int64_t c = 0; c < columns; ++c) sums[c] = add ? sums[c] + row[c] : row[c];
    }
  }
}

template <class T, int Neurons>
inline void multiply_panel(int64_t rows, const T* signal, const T* panel, T* sums, int64_t neurons,
                           int64_t columns, bool add) {
  const auto kernel = columns <= kLanes<T> ? multiply<T, Neurons, 1> : multiply<T, Neurons, 2>;
  kernel(rows, signal, panel, sums, neurons, columns, add);
}

// By the smallest microtile that holds the neurons.
template <class T>
inline void multiply_microtile(int64_t rows, const T* signal, const T* panel, T* sums,
                               int64_t neurons, int64_t columns, bool add) {
  constexpr int third = kMicroNeurons / 3;
  const auto kernel = neurons > 2 * third ? multiply_panel<T, kMicroNeurons>
                      : neurons > third   ? multiply_panel<T, 2 * third>
                                          : multiply_panel<T, third>;
  kernel(rows, signal, panel, sums, neurons, columns, add);
}

}  // namespace
}  // namespace ghl::cpu
