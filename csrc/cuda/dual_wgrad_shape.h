// The shapes of dual_wgrad.h that are compiled, what a block of one has in shared memory and where,
// and what a launch is told.
#pragma once

#include <initializer_list>

#include "device.h"
#include "division.h"
#include "params.h"

namespace ghl::cuda {

// What the kernel is told beyond the layer's parameters; computed once, on the host.
struct DualWgradArguments : DualWgradParams {
  int32_t columns, column_tiles;
  Division positions, width;    // of a row among the output positions of an image, of a line
  bool wide_x, wide_y, wide_g;  // whether 16 bytes can be copied at once
};

inline bool is_wide(const void* data, int32_t count, int64_t unit, std::initializer_list<int64_t> s,
                    int32_t vector) {
  bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 && count % vector == 0 && unit == 1;
  for (int64_t stride : s) wide = wide && stride % vector == 0;
  return wide;
}

inline DualWgradArguments dual_wgrad_arguments(const DualWgradParams& p, int32_t tile_columns) {
  DualWgradArguments a{};
  static_cast<DualWgradParams&>(a) = p;
  a.columns = p.channels * p.kernel_h * p.kernel_w;
  a.column_tiles = (a.columns + tile_columns - 1) / tile_columns;
  a.positions = Division::by(p.out_height * p.out_width);
  a.width = Division::by(p.out_width);
  const int32_t vector = p.dtype == Dtype::float32 ? 4 : 8;
  // the stride of a dimension of one, as a matrix has as an image, is any number
  const int64_t height = p.in_height > 1 ? p.x.height : 0, width = p.in_width > 1 ? p.x.width : 0;
  a.wide_x = is_wide(p.x.data, p.channels, p.x.channel, {p.x.image, height, width}, vector);
  a.wide_y = is_wide(p.y.data, p.neurons, p.y.column, {p.y.row}, vector);
  a.wide_g = is_wide(p.g.data, p.neurons, p.g.column, {p.g.row}, vector);
  return a;
}

// Shapes of the work of a block and of its warps.
template <class T, Precision PRECISION_, bool POINTWISE_, int NEURONS_, int COLUMNS_, int WARPS,
          int STAGES_>
struct DualWgradShape {
  using Number = T;
  static constexpr Precision PRECISION = PRECISION_;
  static constexpr bool POINTWISE = POINTWISE_;
  static constexpr int ROWS = 64 / sizeof(T), NEURONS = NEURONS_, COLUMNS = COLUMNS_;
  static constexpr int STAGES = STAGES_, THREADS = 32 * WARPS;
  static constexpr int VECTOR = 16 / sizeof(T);  // numbers of a 16-byte chunk
  static constexpr int DEPTH = 32 / sizeof(T);   // rows that one mma sums over
  static constexpr int WARP_NEURONS = NEURONS / WARPS;
  static constexpr int TILES_K = WARP_NEURONS / 16, TILES_C = COLUMNS / 8;  // mma's of a warp
  static constexpr int STAGE_NUMBERS = ROWS * (COLUMNS + 2 * NEURONS);
  static constexpr int THREADS_PER_ROW = THREADS / ROWS;
  // Where the table of columns has a column: those that the threads of a warp read at once, of a
  // chunk each, lie side by side, or they would all be in the same banks.
  static constexpr GHL_HOST_DEVICE int slot(int column) {
    return column % VECTOR * (COLUMNS / VECTOR) + column / VECTOR;
  }
  static_assert(WARP_NEURONS % 16 == 0 && TILES_C % 2 == 0 && THREADS_PER_ROW <= 32);

  static constexpr Tile tile();
};

// Where a column of the tile is read: its offset in an image, and the tap's place under the kernel.
struct Column {
  int64_t offset;
  int32_t h, w;
};

template <class Shape>
struct DualWgradShared {
  typename Shape::Number numbers[Shape::STAGES][Shape::STAGE_NUMBERS];
  float largest[Shape::STAGES][Shape::ROWS], inverse[Shape::STAGES][Shape::ROWS];
  int32_t winner[Shape::STAGES][Shape::ROWS];
  Column columns[Shape::COLUMNS];
};

template <class T, Precision P, bool POINTWISE, int K, int C, int WARPS, int STAGES>
constexpr Tile DualWgradShape<T, P, POINTWISE, K, C, WARPS, STAGES>::tile() {
  return {ROWS, K, C, THREADS, STAGES, int32_t(sizeof(DualWgradShared<DualWgradShape>))};
}

// Where chunk `chunk` of row `row` of a tile lies: rows that one instruction reads are in different
// banks. For 16-bit tiles of 64 columns this is the 128-byte swizzle of the tensor map.
template <class T>
GHL_HOST_DEVICE int swizzled(int row, int chunk) {
  return sizeof(T) == 2 ? chunk ^ (row & 7) : chunk ^ (row & 3) * 2;
}

template <class T, int WIDTH>
GHL_DEVICE T* at(T* tile, int row, int column) {
  constexpr int vector = 16 / sizeof(T);
  return tile + row * WIDTH + swizzled<T>(row, column / vector) * vector + column % vector;
}

// Blocks of a launch: tiles, splits, groups.
inline dim3 dual_wgrad_grid(const DualWgradArguments& a, const Tile& tile) {
  const unsigned neuron_tiles = (a.neurons + tile.neurons - 1) / tile.neurons;
  return {neuron_tiles * unsigned(a.column_tiles), unsigned(a.splits), unsigned(a.groups)};
}

// Every shape that is compiled: tile 0 for all, 1 for large layers, 2 for whole rows of 256
// neurons.
template <class T, Precision PRECISION, bool POINTWISE, int TILE>
struct CompiledShape;
template <class T, Precision P, bool POINTWISE>
struct CompiledShape<T, P, POINTWISE, 0> : DualWgradShape<T, P, POINTWISE, 64, 64, 4, 4> {};
template <class T, bool POINTWISE>  // whose operands in parts take the registers of the other sums
struct CompiledShape<T, Precision::tf32x3, POINTWISE, 0>
    : DualWgradShape<T, Precision::tf32x3, POINTWISE, 64, 32, 4, 4> {};
template <class T, Precision P, bool POINTWISE>
struct CompiledShape<T, P, POINTWISE, 1> : DualWgradShape<T, P, POINTWISE, 128, 128, 8, 3> {};
template <class T, Precision P>
struct CompiledShape<T, P, true, 2> : DualWgradShape<T, P, true, 256, 64, 8, 3> {};

// `f` of the compiled shape that a tile's number names; `none` where there is no such shape.
template <class T, Precision PRECISION, class Result, class F>
Result with_shape(int number, bool pointwise, Result none, F&& f) {
  if (pointwise && number == 0) return f(CompiledShape<T, PRECISION, true, 0>{});
  if (!pointwise && number == 0) return f(CompiledShape<T, PRECISION, false, 0>{});
  if constexpr (PRECISION != Precision::tf32x3) {
    if (pointwise && number == 1) return f(CompiledShape<T, PRECISION, true, 1>{});
    if (!pointwise && number == 1) return f(CompiledShape<T, PRECISION, false, 1>{});
  }
  if constexpr (sizeof(T) == 2)
    if (pointwise && number == 2) return f(CompiledShape<T, PRECISION, true, 2>{});
  return none;
}

}  // namespace ghl::cuda
