// Tiles of the postsynaptic signals: g as it is, and u recomputed from y, for some rows and neurons.
//
// A row of y is one competition: an output position of a convolution, a sample of a linear layer.
// Softmax is exp(y/tau - maximum) / sum with maximum and sum of the whole row, so that a slice of
// the neurons can be computed alone and u never exists beyond one tile.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ghl::cpu {
namespace {

constexpr int64_t kTileRows = 256;
// Neurons of a tile lie this far apart: an odd number of cache lines, so that they share no set.
constexpr int64_t kNeuronStride = kTileRows + 16;

// Element (neuron k, row m) is data[k * kNeuronStride + m], or data[m * row_stride + k].
template <class T>
struct SignalTile {
  T* data;
  bool neurons_contiguous;
  int64_t row_stride;
};

inline int64_t signal_row_stride(int64_t neurons) { return round_up(neurons, 16) + 16; }

// Elements of a SignalTile in either order, with room to read a whole microtile at the end.
inline int64_t signal_tile_elements(int64_t neurons) {
  return signal_row_stride(neurons) * kNeuronStride;
}

inline bool neurons_contiguous(const Activation& a) { return a.stride[1] == 1 && a.size[1] > 1; }

inline int64_t rows_of(const Activation& a) { return a.size[0] * a.size[2] * a.size[3]; }

// The longest stretch of consecutive rows whose elements lie a constant step apart.
struct Runs {
  int64_t length = 1, step = 0;

  explicit Runs(const Activation& a) {
    constexpr int innermost_first[] = {3, 2, 0};
    for (int d : innermost_first) {
      if (a.size[d] == 1) continue;
      if (length == 1) {
        step = a.stride[d];
      } else if (a.stride[d] != length * step) {
        break;
      }
      length *= a.size[d];
    }
  }
};

inline int64_t row_offset(const Activation& a, int64_t row) {
  const int64_t w = row % a.size[3], h = row / a.size[3] % a.size[2];
  const int64_t n = row / (a.size[3] * a.size[2]);
  return n * a.stride[0] + h * a.stride[2] + w * a.stride[3];
}

template <class In, class T>
inline void convert(const In* from, int64_t step, T* to, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i * step]);
  }
}

// Neurons [k0, k1) of rows [row0, row0 + rows), from any strides and dtype.
template <class In, class T>
void gather(const Activation& a, int64_t k0, int64_t k1, int64_t row0, int64_t rows,
            SignalTile<T> tile) {
  const In* data = static_cast<const In*>(a.data);
  if (tile.neurons_contiguous) {
    for (int64_t m = 0; m < rows; ++m) {
      const In* from = data + row_offset(a, row0 + m) + k0 * a.stride[1];
      convert(from, a.stride[1], tile.data + m * tile.row_stride, k1 - k0);
    }
    return;
  }
  const Runs runs(a);
  for (int64_t m = 0; m < rows;) {
    const int64_t row = row0 + m;
    const int64_t count = minimum(runs.length - row % runs.length, rows - m);
    const In* from = data + row_offset(a, row);
    for (int64_t k = k0; k < k1; ++k) {
      T* to = tile.data + (k - k0) * kNeuronStride + m;
      convert(from + k * a.stride[1], runs.step, to, count);
    }
    m += count;
  }
}

// Of each row: the largest y, and the sum over neurons of exp((y - maximum) / tau).
// A NaN in the row makes both NaN. `winner` is the first neuron at the maximum.
template <class T>
struct RowStatistics {
  T* maximum;
  T* sum;
  int32_t* winner;
};

template <class T>
void row_statistics(SignalTile<T> y, int64_t neurons, int64_t rows, T tau, RowStatistics<T> out) {
  using V = Vector<T>;
  constexpr int64_t lanes = kLanes<T>;
  if (!y.neurons_contiguous) {
    for (int64_t m = 0; m < rows; m += lanes) {
      V maximum = load(y.data + m), sum{};
      for (int64_t k = 1; k < neurons; ++k)
        maximum = larger_of_lanes<T>(maximum, load(y.data + k * kNeuronStride + m));
      for (int64_t k = 0; k < neurons; ++k)
        sum += exp_nonpositive((load(y.data + k * kNeuronStride + m) - maximum) / tau);
      store(out.maximum + m, maximum);
      store(out.sum + m, sum);
    }
    return;
  }
  for (int64_t m = 0; m < rows; ++m) {
    T* row = y.data + m * y.row_stride;
    for (int64_t k = neurons; k % lanes; ++k) row[k] = -INFINITY;
    V maxima = load(row), sums{};
    for (int64_t k = lanes; k < neurons; k += lanes) maxima = larger_of_lanes<T>(maxima, load(row + k));
    T maximum = maxima[0];
    for (int64_t i = 1; i < lanes; ++i) maximum = larger(maximum, maxima[i]);
    for (int64_t k = 0; k < neurons; k += lanes)
      sums += exp_nonpositive((load(row + k) - maximum) / tau);
    out.maximum[m] = maximum;
    out.sum[m] = sum_of_lanes<T>(sums);
  }
}

template <class T>
inline T& element(SignalTile<T> tile, int64_t k, int64_t m) {
  return tile.data[tile.neurons_contiguous ? m * tile.row_stride + k : k * kNeuronStride + m];
}

template <class T>
void find_winners(SignalTile<T> y, int64_t neurons, int64_t rows, RowStatistics<T> out) {
  for (int64_t m = 0; m < rows; ++m) {
    int32_t k = 0;
    while (k + 1 < neurons && !(element(y, k, m) == out.maximum[m])) ++k;
    out.winner[m] = k;
  }
}

// exp((y - maximum) / tau) / sum, in place.
template <class T>
void softmax(SignalTile<T> y, int64_t neurons, int64_t rows, T tau, RowStatistics<T> of) {
  if (y.neurons_contiguous) {
    for (int64_t m = 0; m < rows; ++m) {
      T* row = y.data + m * y.row_stride;
      for (int64_t k = 0; k < neurons; k += kLanes<T>)
        store(row + k, exp_nonpositive((load(row + k) - of.maximum[m]) / tau) / of.sum[m]);
    }
    return;
  }
  for (int64_t k = 0; k < neurons; ++k) {
    T* row = y.data + k * kNeuronStride;
    for (int64_t m = 0; m < rows; m += kLanes<T>) {
      const Vector<T> e = exp_nonpositive((load(row + m) - load(of.maximum + m)) / tau);
      store(row + m, e / load(of.sum + m));
    }
  }
}

// y becomes u in place. The tile holds the neurons from k0 on.
template <class T>
void compete(SignalTile<T> y, int64_t k0, int64_t neurons, int64_t rows, Competition competition,
             T tau, RowStatistics<T> of) {
  if (competition == Competition::linear) return;
  const bool hard = competition == Competition::hard;
  if (!hard) softmax(y, neurons, rows, tau, of);
  if (competition == Competition::softmax) return;
  for (int64_t m = 0; m < rows; ++m) {
    const T lost = of.maximum[m] != of.maximum[m] ? of.maximum[m] : T(0);
    for (int64_t k = 0; k < neurons; ++k) {
      T& u = element(y, k, m);
      const bool won = of.winner[m] == k0 + k;
      u = hard ? lost + (won ? 1 : 0) : won ? u : -u;
    }
  }
}

// totals[k] += the sum of u over the rows of the tile.
template <class T>
void add_totals(SignalTile<T> u, int64_t neurons, int64_t rows, double* totals) {
  const int64_t step = u.neurons_contiguous ? kLanes<T> : 1;
  for (int64_t k = 0; k < neurons; k += step) {
    Vector<T> sum{};
    if (u.neurons_contiguous) {
      for (int64_t m = 0; m < rows; ++m) sum += load(u.data + m * u.row_stride + k);
      for (int64_t i = 0; i < minimum(step, neurons - k); ++i) totals[k + i] += sum[i];
    } else {
      const T* row = u.data + k * kNeuronStride;
      int64_t m = 0;
      for (; m + kLanes<T> <= rows; m += kLanes<T>) sum += load(row + m);
      for (; m < rows; ++m) sum[0] += row[m];
      totals[k] += sum_of_lanes<T>(sum);
    }
  }
}

}  // namespace
}  // namespace ghl::cpu
