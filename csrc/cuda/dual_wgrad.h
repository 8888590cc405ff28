// G = gᵀx and H0 = uᵀx in one pass, as an implicit GEMM with mma.sync: linear layers and
// convolutions.
//
// Cost: 4·M·K·(C·R·S) FLOPs for M rows (output positions), K neurons, C·R·S columns; reads x once
// per tile of neurons (overlapping patches from L2), y and g once per tile of columns, writes two
// K × C·R·S float32 sums per split. u exists only in registers, as the first operand of its
// product: a fragment of y becomes a fragment of u, and the fragments of x serve both products.
// For: compute capability 8.0 and newer; any kernel size, stride, padding, dilation, groups, any
// strides. 16-byte copies where channels (or neurons) are a multiple of 16 bytes and lie side by
// side; else number by number, which is slow. A group of few neurons wastes its tile.
//
// A block owns NEURONS × COLUMNS sums and one split of the rows; ROWS rows of x, y and g are in
// shared memory STAGES times over. Columns are in the order (tap, channel), whatever the weight's.
#pragma once

#include "chunk.h"
#include "competition.h"
#include "device.h"
#include "dual_wgrad_shape.h"
#include "products.h"

namespace ghl::cuda {

// The kernel, as a thread sees it.
template <class Shape>
struct DualWgrad {
  using T = typename Shape::Number;
  static constexpr int VECTOR = Shape::VECTOR, DEPTH = Shape::DEPTH;

  const DualWgradArguments& p;
  DualWgradShared<Shape>& shared;
  const int thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int group = blockIdx.z;
  const int first_neuron = blockIdx.x / p.column_tiles * Shape::NEURONS;
  const int first_column = blockIdx.x % p.column_tiles * Shape::COLUMNS;
  const int warp_neuron = warp * Shape::WARP_NEURONS;

  float G[Shape::TILES_K][Shape::TILES_C][4] = {};
  float H0[Shape::TILES_K][Shape::TILES_C][4] = {};
  float u_sums[Shape::TILES_K][2] = {};

  GHL_DEVICE DualWgrad(const DualWgradArguments& arguments, DualWgradShared<Shape>& memory)
      : p(arguments), shared(memory) {}

  GHL_DEVICE T* x_tile(int stage) { return shared.numbers[stage]; }
  GHL_DEVICE T* y_tile(int stage) { return x_tile(stage) + Shape::ROWS * Shape::COLUMNS; }
  GHL_DEVICE T* g_tile(int stage) { return y_tile(stage) + Shape::ROWS * Shape::NEURONS; }

  GHL_DEVICE bool makes_statistics() const {
    return !p.statistics.largest && p.competition != Competition::linear;
  }
  GHL_DEVICE bool sums_u() const { return p.u_sums && first_column == 0; }

  GHL_DEVICE void run() {
    find_columns();
    __syncthreads();
    const int32_t first = blockIdx.y * p.rows_per_split;
    const int32_t last = min(int64_t(first) + p.rows_per_split, int64_t(p.rows));
    const int32_t blocks = (last - first + Shape::ROWS - 1) / Shape::ROWS;
    for (int block = 0; block < Shape::STAGES - 1; ++block) {
      if (block < blocks) load(block, first + block * Shape::ROWS);
      copy_async_commit();
    }
    for (int block = 0; block < blocks; ++block) {
      copy_async_wait<Shape::STAGES - 2>();
      __syncthreads();
      const int next = block + Shape::STAGES - 1;
      if (next < blocks) load(next % Shape::STAGES, first + next * Shape::ROWS);
      copy_async_commit();
      const int stage = block % Shape::STAGES;
      if (makes_statistics()) {
        find_statistics(stage, first + block * Shape::ROWS);
        __syncthreads();
      }
      multiply(stage);
    }
    store();
  }

  // The table of the tile's columns; what is beyond the last lies beyond any image.
  GHL_DEVICE void find_columns() {
    for (int i = thread; i < Shape::COLUMNS; i += Shape::THREADS) {
      const int column = first_column + i;
      Column& known = shared.columns[Shape::slot(i)];
      if (column >= p.columns) {
        known = {0, 1 << 30, 0};
        continue;
      }
      const int tap = column / p.channels, channel = column % p.channels;
      const int h = tap / p.kernel_w * p.dilation_h, w = tap % p.kernel_w * p.dilation_w;
      known = {h * p.x.height + w * p.x.width + channel * p.x.channel, h, w};
    }
  }

  GHL_DEVICE void load(int stage, int32_t first_row) {
    load_patches(x_tile(stage), first_row);
    load_signal(y_tile(stage), p.y, p.wide_y, first_row);
    load_signal(g_tile(stage), p.g, p.wide_g, first_row);
    if (p.statistics.largest && p.competition != Competition::linear)
      load_statistics(stage, first_row);
  }

  // Rows of the signal (y or g) for the tile's neurons; zeros beyond the last row and neuron.
  GHL_DEVICE void load_signal(T* tile, const Matrix& signal, bool wide, int32_t first_row) {
    constexpr int chunks = Shape::NEURONS / VECTOR, rows = Shape::THREADS / chunks;
    const int chunk = thread % chunks, neuron = first_neuron + chunk * VECTOR;
    const T* column =
        static_cast<const T*>(signal.data) + (int64_t(group) * p.neurons + neuron) * signal.column;
    GHL_UNROLL
    for (int row = thread / chunks; row < Shape::ROWS; row += rows) {
      T* to = at<T, Shape::NEURONS>(tile, row, chunk * VECTOR);
      const bool inside = first_row + row < p.rows;
      const int count = inside ? min(max(p.neurons - neuron, 0), VECTOR) : 0;
      const T* from = column + (first_row + row) * signal.row;
      if (wide) {
        copy_async(to, count ? from : static_cast<const T*>(signal.data), count ? 16 : 0);
      } else {
        for (int i = 0; i < VECTOR; ++i)
          to[i] = i < count ? from[i * signal.column] : from_float<T>(0.0f);
      }
    }
  }

  // Rows of patches for the tile's columns; zeros off the image and beyond the last row and column.
  GHL_DEVICE void load_patches(T* tile, int32_t first_row) {
    constexpr int chunks = Shape::COLUMNS / VECTOR, rows = Shape::THREADS / chunks;
    const int chunk = thread % chunks;
    const T* x = static_cast<const T*>(p.x.data) + int64_t(group) * p.channels * p.x.channel;
    GHL_UNROLL
    for (int row = thread / chunks; row < Shape::ROWS; row += rows) {
      T* to = at<T, Shape::COLUMNS>(tile, row, chunk * VECTOR);
      const bool inside = first_row + row < p.rows;
      int h = 0, w = 0;
      int64_t base = (first_row + row) * p.x.image;
      if (!Shape::POINTWISE) {
        const uint32_t image = p.positions.of(first_row + row);
        const uint32_t position = first_row + row - image * p.positions.divisor;
        const uint32_t line = p.width.of(position);
        h = int(line) * p.stride_h - p.padding_h;
        w = int(position - line * p.width.divisor) * p.stride_w - p.padding_w;
        base = image * p.x.image + h * p.x.height + w * p.x.width;
      }
      if (p.wide_x) {
        const Column column = shared.columns[Shape::slot(chunk * VECTOR)];
        const bool live = inside && on_image(h + column.h, w + column.w);
        copy_async(to, live ? x + base + column.offset : x, live ? 16 : 0);
      } else {
        for (int i = 0; i < VECTOR; ++i) {
          const Column column = shared.columns[Shape::slot(chunk * VECTOR + i)];
          const bool live = inside && on_image(h + column.h, w + column.w);
          to[i] = live ? x[base + column.offset] : from_float<T>(0.0f);
        }
      }
    }
  }
  GHL_DEVICE bool on_image(int h, int w) const {
    return unsigned(h) < unsigned(p.in_height) && unsigned(w) < unsigned(p.in_width);
  }

  GHL_DEVICE void load_statistics(int stage, int32_t first_row) {
    constexpr int chunks = Shape::ROWS / 4;
    const int array = thread / chunks, row = thread % chunks * 4;
    if (array > (p.competition == Competition::softmax ? 1 : 2)) return;
    const int32_t count = p.rows - first_row - row;  // 0 or fewer beyond the last row
    if (array == 0)
      load_four(shared.largest[stage] + row, p.statistics.largest, first_row + row, count);
    else if (array == 1)
      load_four(shared.inverse[stage] + row, p.statistics.inverse, first_row + row, count);
    else
      load_four(shared.winner[stage] + row, p.statistics.winner, first_row + row, count);
  }

  // Numbers of four rows, of which `count` are left: no copy reaches beyond the last.
  template <class Number>
  GHL_DEVICE static void load_four(Number* to, const Number* from, int32_t first, int32_t count) {
    if (count >= 4) return copy_async(to, from + first, 16);
    for (int i = 0; i < 4; ++i) to[i] = i < count ? from[first + i] : Number{};
  }

  // The statistics of rows that lie whole in the tile: neighbouring lanes share a row.
  GHL_DEVICE void find_statistics(int stage, int32_t first_row) {
    constexpr int per_row = Shape::THREADS_PER_ROW, chunks = Shape::NEURONS / VECTOR / per_row;
    const int row = thread / per_row, part = thread % per_row;
    float y[chunks][VECTOR], largest = -INFINITY;
    GHL_UNROLL
    for (int i = 0; i < chunks; ++i) {
      const int neuron = (i * per_row + part) * VECTOR;
      load_chunk(y[i], at<T, Shape::NEURONS>(y_tile(stage), row, neuron));
      GHL_UNROLL
      for (int j = 0; j < VECTOR; ++j) {
        if (neuron + j >= p.neurons) y[i][j] = -INFINITY;
        largest = fmaxf(largest, y[i][j]);
      }
    }
    GHL_UNROLL
    for (int mask = per_row / 2; mask > 0; mask /= 2)
      largest = fmaxf(largest, shuffle_xor(largest, mask));
    const float top = finite_or_zero(largest);
    float total = 0.0f;
    int32_t winner = INT32_MAX;
    GHL_UNROLL
    for (int i = 0; i < chunks * VECTOR; ++i) {
      const float number = y[i / VECTOR][i % VECTOR];
      const int neuron = (i / VECTOR * per_row + part) * VECTOR + i % VECTOR;
      if (p.competition != Competition::hard)
        total += exp2_approximate((number - top) * p.scale);
      else if (number != number)
        total = number;
      if (number == largest && neuron < p.neurons) winner = min(winner, neuron);
    }
    GHL_UNROLL
    for (int mask = per_row / 2; mask > 0; mask /= 2) {
      total += shuffle_xor(total, mask);
      winner = min(winner, shuffle_xor(winner, mask));
    }
    if (p.competition == Competition::hard) total += 1.0f;
    const bool inside = first_row + row < p.rows;
    if (part == 0) {
      shared.largest[stage][row] = inside ? largest : 0.0f;
      shared.inverse[stage][row] = inside ? inverse_of(total, largest, p.competition) : 0.0f;
      shared.winner[stage][row] = winner;
    }
  }

  // A warp has neurons of its own, so that every u is made once in a block, and all columns.
  GHL_DEVICE void multiply(int stage) {
    GHL_UNROLL
    for (int row = 0; row < Shape::ROWS; row += DEPTH) {
      uint32_t g[Shape::TILES_K][4], u[Shape::TILES_K][4];
      RowStatistics rows;
      if (p.competition != Competition::linear) rows = statistics_of_fragment(stage, row);
      GHL_UNROLL
      for (int i = 0; i < Shape::TILES_K; ++i) {
        load_first_operand(g[i], g_tile(stage), row, warp_neuron + 16 * i);
        load_first_operand(u[i], y_tile(stage), row, warp_neuron + 16 * i);
        if (p.competition == Competition::softmax)
          make_u<true>(u[i], rows, i);
        else if (p.competition != Competition::linear)
          make_u<false>(u[i], rows, i);
        if (sums_u()) add_u(u[i], i);
      }
      GHL_UNROLL
      for (int j = 0; j < Shape::TILES_C; j += 2) {
        uint32_t x[2][2];
        load_second_operands(x, x_tile(stage), row, 8 * j);
        GHL_UNROLL
        for (int i = 0; i < Shape::TILES_K; ++i) {
          add_products<Shape::PRECISION>(G[i][j], G[i][j + 1], g[i], x, T{});
          add_products<Shape::PRECISION>(H0[i][j], H0[i][j + 1], u[i], x, T{});
        }
      }
    }
  }

  // 16 neurons by DEPTH rows of a signal as the first operand of an mma.
  GHL_DEVICE void load_first_operand(uint32_t (&a)[4], T* tile, int row, int neuron) {
    if constexpr (sizeof(T) == 2) {
      const int matrix = lane / 8;
      load_matrices_transposed(
          a, at<T, Shape::NEURONS>(tile, row + matrix / 2 * 8 + lane % 8, neuron + matrix % 2 * 8));
    } else {
      GHL_UNROLL
      for (int i = 0; i < 4; ++i)
        a[i] = float_to_bits(*at<T, Shape::NEURONS>(tile, row + lane % 4 + i / 2 * 4,
                                                    neuron + lane / 4 + i % 2 * 8));
    }
  }

  // DEPTH rows by 16 columns of x as the second operands of two mma's.
  GHL_DEVICE void load_second_operands(uint32_t (&b)[2][2], T* tile, int row, int column) {
    if constexpr (sizeof(T) == 2) {
      const int matrix = lane / 8;
      uint32_t both[4];
      load_matrices_transposed(both, at<T, Shape::COLUMNS>(tile, row + matrix % 2 * 8 + lane % 8,
                                                           column + matrix / 2 * 8));
      b[0][0] = both[0], b[0][1] = both[1], b[1][0] = both[2], b[1][1] = both[3];
    } else {
      GHL_UNROLL
      for (int i = 0; i < 4; ++i)
        b[i / 2][i % 2] = float_to_bits(*at<T, Shape::COLUMNS>(tile, row + lane % 4 + i % 2 * 4,
                                                               column + i / 2 * 8 + lane / 4));
    }
  }

  // The statistics of the rows whose numbers a lane has in a fragment of y.
  struct RowStatistics {
    float largest[DEPTH / 4], inverse[DEPTH / 4];
    int32_t winner[DEPTH / 4];
  };
  GHL_DEVICE RowStatistics statistics_of_fragment(int stage, int row) const {
    RowStatistics rows;
    GHL_UNROLL
    for (int i = 0; i < DEPTH / 4; ++i) {
      const int m = row + (sizeof(T) == 2 ? lane % 4 * 2 + i / 2 * 8 + i % 2 : lane % 4 + i * 4);
      rows.largest[i] = shared.largest[stage][m];
      rows.inverse[i] = shared.inverse[stage][m];
      if (p.competition != Competition::softmax) rows.winner[i] = shared.winner[stage][m];
    }
    return rows;
  }

  // A fragment of y becomes one of u: a register is one neuron's number of one row, or of two.
  // SOFTMAX: the competition is known to be that, so that no number asks.
  template <bool SOFTMAX>
  GHL_DEVICE void make_u(uint32_t (&fragment)[4], const RowStatistics& rows, int tile_k) const {
    const int neuron = group * p.neurons + first_neuron + warp_neuron + 16 * tile_k + lane / 4;
    GHL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = i / 2 * (DEPTH / 8);
      if constexpr (sizeof(T) == 2) {
        const float2 y = unpack(fragment[i], T{});
        fragment[i] = pack(u_of<SOFTMAX>(y.x, rows, row, neuron + i % 2 * 8),
                           u_of<SOFTMAX>(y.y, rows, row + 1, neuron + i % 2 * 8), T{});
      } else {
        const float y = bits_to_float(fragment[i]);
        fragment[i] = float_to_bits(u_of<SOFTMAX>(y, rows, row, neuron + i % 2 * 8));
      }
    }
  }
  template <bool SOFTMAX>
  GHL_DEVICE float u_of(float y, const RowStatistics& rows, int i, int neuron) const {
    const bool wins = !SOFTMAX && rows.winner[i] == neuron;
    const Competition competition = SOFTMAX ? Competition::softmax : p.competition;
    return compete(y, rows.largest[i], rows.inverse[i], wins, p.scale, competition);
  }

  GHL_DEVICE void add_u(const uint32_t (&u)[4], int tile_k) {
    GHL_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 2) {
        const float2 both = unpack(u[i], T{});
        u_sums[tile_k][i % 2] += both.x + both.y;
      } else {
        u_sums[tile_k][i % 2] += bits_to_float(u[i]);
      }
    }
  }

  GHL_DEVICE void store() {
    const int64_t neurons = int64_t(p.groups) * p.neurons;
    const int64_t part = blockIdx.y * neurons;
    GHL_UNROLL
    for (int i = 0; i < Shape::TILES_K; ++i) {
      GHL_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int neuron = first_neuron + warp_neuron + 16 * i + 8 * half + lane / 4;
        const int64_t row = part + int64_t(group) * p.neurons + neuron;
        if (sums_u()) store_u_sum(u_sums[i][half], neuron < p.neurons, p.u_sums + row);
        if (neuron >= p.neurons) continue;
        GHL_UNROLL
        for (int j = 0; j < 2 * Shape::TILES_C; ++j) {
          const int column = first_column + j / 2 * 8 + lane % 4 * 2 + j % 2;
          if (column >= p.columns) continue;
          const int64_t to = row * p.columns + in_weight(column);
          p.G[to] = G[i][j / 2][2 * half + j % 2];
          p.H0[to] = H0[i][j / 2][2 * half + j % 2];
        }
      }
    }
  }
  GHL_DEVICE int in_weight(int column) const {
    if (Shape::POINTWISE || p.channels_last) return column;
    return column % p.channels * (p.kernel_h * p.kernel_w) + column / p.channels;
  }
  GHL_DEVICE void store_u_sum(float sum, bool inside, float* to) {
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    if (inside && lane % 4 == 0) *to = sum;
  }
};

template <class Shape>
GHL_KERNEL void GHL_LAUNCH_BOUNDS(Shape::THREADS, 1)
    dual_wgrad_kernel(GHL_CONSTANT_ARGUMENT DualWgradArguments arguments) {
  auto& shared = *reinterpret_cast<DualWgradShared<Shape>*>(shared_memory());
  DualWgrad<Shape>(arguments, shared).run();
}

}  // namespace ghl::cuda
