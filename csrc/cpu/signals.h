// Tiles of the postsynaptic signals: g as it is, and u recomputed from y, for some rows and
// neurons.
//
// A row of y is one competition: an output position of a convolution, a sample of a linear layer.
// Softmax is exp(y/tau - maximum) / sum with maximum and sum of the whole row, so that a slice of
// the neurons can be computed alone and u never exists beyond one tile.
#pragma once

#include <limits>

#include "kernels.h"
#include "simd.h"
#include "transpose.h"

namespace ghl::cpu {
namespace {

constexpr int64_t kTileRows = 256;
// A tile is (neurons, rows). Neurons lie an odd number of cache lines apart: they share no set.
constexpr int64_t kNeuronStride = kTileRows + 16;

// Elements of a tile, with room to read a whole microtile at the end.
inline int64_t signal_tile_elements(int64_t neurons) {
  return (neurons + 16) * kNeuronStride;
}

inline int64_t rows_of(const Activation& a) {
  return a.size[0] * a.size[2] * a.size[3];
}

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

// Neurons [k0, k1) of rows [row0, row0 + rows), from any strides and dtype.
template <class In, class T>
void gather(const Activation& a, int64_t k0, int64_t k1, int64_t row0, int64_t rows, T* tile) {
  const In* data = static_cast<const In*>(a.data) + k0 * a.stride[1];
  const Runs runs(a);
  for (int64_t m = 0; m < rows;) {
    const int64_t row = row0 + m;
    const int64_t count = minimum(runs.length - row % runs.length, rows - m);
    const In* from = data + row_offset(a, row);
    if (a.stride[1] == 1 && runs.step != 1) {
      transpose(from, runs.step, count, k1 - k0, tile + m, kNeuronStride);
    } else {
      for (int64_t k = 0; k < k1 - k0; ++k)
        convert(from + k * a.stride[1], runs.step, tile + k * kNeuronStride + m, count);
    }
    m += count;
  }
}

// 1 / tau, finite: a tau too small for T makes the largest y win, not NaN.
template <class T>
T inverse(double tau) {
  constexpr double largest = std::numeric_limits<T>::max();
  return static_cast<T>(1 / tau < largest ? 1 / tau : largest);
}

// Of each row: the largest y, and the sum over neurons of exp((y - maximum) / tau).
// A NaN in the row makes both NaN. `winner` is the first neuron at the maximum.
template <class T>
struct RowStatistics {
  T* maximum;
  T* sum;
  int32_t* winner;
};

// With `powers`, which may be y itself, the exponentials are kept there.
template <class T>
void row_statistics(const T* y, int64_t neurons, int64_t rows, T inverse_tau, RowStatistics<T> out,
                    T* powers = nullptr) {
  for (int64_t m = 0; m < rows; m += kLanes<T>) {
    Vector<T> maximum = load(y + m), sum{};
    for (int64_t k = 1; k < neurons; ++k)
      maximum = larger_of_lanes<T>(maximum, load(y + k * kNeuronStride + m));
    for (int64_t k = 0; k < neurons; ++k) {
      const int64_t at = k * kNeuronStride + m;
      const Vector<T> power = exp_nonpositive((load(y + at) - maximum) * inverse_tau);
      if (powers) store(powers + at, power);
      sum += power;
    }
    store(out.maximum + m, maximum);
    store(out.sum + m, sum);
  }
}

template <class T>
void find_winners(const T* y, int64_t neurons, int64_t rows, RowStatistics<T> out) {
  for (int64_t m = 0; m < rows; ++m) {
    int32_t k = 0;
    while (k + 1 < neurons && !(y[k * kNeuronStride + m] == out.maximum[m])) ++k;
    out.winner[m] = k;
  }
}

// The tile, which holds exp((y - maximum) / tau), becomes softmax in place.
template <class T>
void divide_by_sum(T* powers, int64_t neurons, int64_t rows, RowStatistics<T> of) {
  T share[kNeuronStride];
  for (int64_t m = 0; m < rows; m += kLanes<T>) store(share + m, 1 / load(of.sum + m));
  for (int64_t k = 0; k < neurons; ++k, powers += kNeuronStride)
    for (int64_t m = 0; m < rows; m += kLanes<T>)
      store(powers + m, load(powers + m) * load(share + m));
}

// y becomes u in place. The tile holds the neurons from k0 on.
template <class T>
void compete(T* y, int64_t k0, int64_t neurons, int64_t rows, Competition competition,
             T inverse_tau, RowStatistics<T> of) {
  if (competition == Competition::linear) return;
  const bool hard = competition == Competition::hard;
  for (int64_t k = 0; k < neurons && !hard; ++k) {
    T* row = y + k * kNeuronStride;
    for (int64_t m = 0; m < rows; m += kLanes<T>)
      store(row + m, exp_nonpositive((load(row + m) - load(of.maximum + m)) * inverse_tau));
  }
  if (!hard) divide_by_sum(y, neurons, rows, of);
  if (competition == Competition::softmax) return;
  for (int64_t k = 0; k < neurons; ++k)
    for (int64_t m = 0; m < rows; ++m) {
      T& u = y[k * kNeuronStride + m];
      const T lost = of.maximum[m] != of.maximum[m] ? of.maximum[m] : T(0);
      const bool won = of.winner[m] == k0 + k;
      u = hard ? lost + (won ? 1 : 0) : won ? u : -u;
    }
}

// totals[k] += the sum of u over the rows of the tile.
template <class T>
void add_totals(const T* u, int64_t neurons, int64_t rows, double* totals) {
  for (int64_t k = 0; k < neurons; ++k) {
    const T* row = u + k * kNeuronStride;
    Vector<T> sum{};
    for_each_vector<T>(rows, [&](int64_t m, int64_t count) { sum += load_some(row + m, count); });
    totals[k] += sum_of_lanes<T>(sum);
  }
}

}  // namespace
}  // namespace ghl::cpu
