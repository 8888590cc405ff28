// What kernels and their launchers are told: pointers, sizes and strides, never tensors.
//
// Strides are in numbers, not bytes. Sizes up to 2^31 - 2^17 are what ghl_kernels/dispatch.py lets
// through; addresses are 64-bit all the same.
#pragma once

#include <climits>
#include <cstdint>

#include "../rule.h"

namespace ghl::cuda {

enum class Dtype : int { float32, float16, bfloat16 };

// How products of float32 are taken; 16-bit products do not ask.
enum class Precision : int { tf32, tf32x3 };

// (rows, columns), as ghl_kernels/layout.py's `as_matrix` gives it.
struct Matrix {
  const void* data;
  int64_t row, column;  // strides
};

// (N, C, H, W) of any strides; a linear layer's rows are N, with H = W = 1.
struct Images {
  const void* data;
  int64_t image, channel, height, width;  // strides
};

// Of each row of y: the largest number, 1 / sum(exp((y - largest) / tau)), the first largest
// neuron. `inverse` is NaN where the largest is not finite; `winner` is only for `hard` and
// `softhebb`. Each array begins at a multiple of 16 bytes.
struct Statistics {
  float *largest, *inverse;
  int32_t* winner;
};

struct StatisticsParams {
  Matrix y;
  Dtype dtype;
  int32_t rows, neurons;
  Competition competition;
  float scale;  // log2(e) / tau, at most the largest float
  Statistics statistics;
  float* lse;  // if not null: log(sum(exp(y / tau))) instead of the statistics
  // Rows of y as (outer, inner): row r lies at r / inner * y.row + r % inner * inner_stride.
  int32_t inner;
  int64_t inner_stride;
};

struct DualWgradParams {
  Images x;
  Matrix y, g;
  Dtype dtype;
  Precision precision;
  int32_t rows;                       // output positions of the batch
  int32_t groups, neurons, channels;  // of one group the last two
  int32_t in_height, in_width, out_height, out_width;
  int32_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  Competition competition;
  float scale;
  Statistics statistics;  // null: whole rows of y lie in a tile, and the kernel makes them itself
  float *G, *H0;          // (splits, groups * neurons, columns)
  float* u_sums;          // (splits, groups * neurons), or null where nobody asks
  void* exchange;  // memory for blocks of threads to exchange u by, or null (sm90_exchange.h)
  int32_t splits;
  int32_t rows_per_split;  // a multiple of the tile's rows
  bool channels_last;  // a row of the weight is (kernel_h, kernel_w, channels), else (.., kh, kw)
};

// How a weight-gradient kernel cuts its work: a block has `rows` by `neurons` of y and g and `rows`
// by `columns` of x in shared memory at once, `stages` times over. `cluster` blocks have neurons
// that follow one another, and the same x; `exchanges`: u, see sm90_exchange.h.
struct Tile {
  int32_t rows, neurons, columns, threads, stages;
  int32_t shared_bytes;
  int32_t cluster = 1;
  bool exchanges = false;
};

// Whether a row of x is the channels of one position, and nothing else.
inline bool is_pointwise(const DualWgradParams& p) {
  return p.in_height == 1 && p.in_width == 1 && p.kernel_h == 1 && p.kernel_w == 1 &&
         p.padding_h == 0 && p.padding_w == 0;
}

struct SumSplitsParams {
  const float *G_parts, *H0_parts, *u_parts;  // u_parts null: no sums of u
  float *G, *H0, *u_sums;
  int64_t weights;  // numbers of G
  int32_t neurons, splits;
};

// One layer of a merge; rows of the weight in its memory order, results dense.
struct MergeLayer {
  const void *G, *H0, *w, *totals;
  Dtype G_dtype, H0_dtype, w_dtype, totals_dtype, update_dtype;
  int32_t out_channels;
  void* update;            // may be H0 itself, then in its dtype
  float *neurons, *layer;  // (3, neurons) and (3): <G, H>, |G|², |H|²
  float* scratch;          // (2, neurons): decay s and max|H|
  int64_t columns;
};

}  // namespace ghl::cuda
