// out += signalᵀ panel for a few neurons and one panel of columns, over the rows of a tile.
//
// Costs 2 * rows * neurons * columns FLOPs; reads rows * (neurons + columns) elements from the
// first two cache levels and updates neurons * columns sums, which stay in registers meanwhile.
// For tiles of kTileRows rows; 12 x 2 accumulators of AVX-512's 32 registers, else 6 x 2 of 16.
#pragma once

#include "patches.h"
#include "signals.h"

namespace ghl::cpu {
namespace {

constexpr int kMicroNeurons = GHL_VECTOR_BYTES == 64 ? 12 : 6;

template <class T, int Neurons, int Vectors>
void multiply(int64_t rows, const T* signal, const T* panel, T* out, int64_t out_stride,
              int64_t neurons, int64_t columns) {
  using V = Vector<T>;
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>, width = Vectors * lanes;
  // The sums are far away when the weight is large; ask for them before they are needed.
  for (int k = 0; k < minimum(Neurons, neurons); ++k)
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(out + k * out_stride + v * lanes, 1);
  V sums[Neurons][Vectors] = {};
  for (int64_t m = 0; m < rows; ++m) {
    V x[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) x[v] = load(panel + m * width + v * lanes);
#pragma GCC unroll 12
    for (int k = 0; k < Neurons; ++k) {
      const V s = broadcast(signal[k * kNeuronStride + m]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[k][v] += s * x[v];
    }
  }
  if (neurons >= Neurons && columns >= width) {
    for (int k = 0; k < Neurons; ++k)
      for (int v = 0; v < Vectors; ++v) {
        T* to = out + k * out_stride + v * lanes;
        store(to, load(to) + sums[k][v]);
      }
    return;
  }
  for (int k = 0; k < minimum(Neurons, neurons); ++k) {
    T row[width];
    for (int v = 0; v < Vectors; ++v) store(row + v * lanes, sums[k][v]);
    for (int64_t c = 0; c < minimum(width, columns); ++c) out[k * out_stride + c] += row[c];
  }
}

template <class T, int Neurons>
inline void multiply_panel(int64_t rows, const T* signal, const T* panel, T* out,
                           int64_t out_stride, int64_t neurons, int64_t columns) {
  const auto kernel = columns <= kLanes<T> ? multiply<T, Neurons, 1> : multiply<T, Neurons, 2>;
  kernel(rows, signal, panel, out, out_stride, neurons, columns);
}

// Any number of neurons against one panel: whole microtiles, then the smallest that holds the rest.
template <class T>
void multiply_neurons(int64_t rows, const T* signal, int64_t neurons, const T* panel, T* out,
                      int64_t out_stride, int64_t columns) {
  constexpr int third = kMicroNeurons / 3;
  for (int64_t k = 0; k < neurons; k += kMicroNeurons) {
    const int64_t rest = neurons - k;
    const auto kernel = rest > 2 * third ? multiply_panel<T, kMicroNeurons>
                        : rest > third   ? multiply_panel<T, 2 * third>
                                         : multiply_panel<T, third>;
    kernel(rows, signal + k * kNeuronStride, panel, out + k * out_stride, out_stride, rest,
           columns);
  }
}

}  // namespace
}  // namespace ghl::cpu
