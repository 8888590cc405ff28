// The arithmetic of the sm_90a weight gradient: where everything lies in shared memory, and which
// part of the work is whose. All of it runs on a host as well.
//
// A box is 64 rows of 64 numbers of 16 bits, one copy of the copy engine: rows of 128 bytes, whose
// eight 16-byte chunks are permuted by the row's number (128-byte swizzle, "Swizzling Modes" of the
// PTX ISA), so that neither ldmatrix nor a lane per row meets a bank twice. x, y and g of a stage
// are boxes side by side.
#pragma once

#include "device.h"
#include "params.h"

namespace ghl::cuda::sm90 {

constexpr int kRows = 64, kBox = 64;
constexpr int kBoxBytes = kRows * kBox * 2;
constexpr int kDepth = 16;  // rows that one wgmma of 16-bit numbers sums over
constexpr int kStages = 4;
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kDescribers = kRows;  // threads that find statistics, a row each

struct RowStatistics {
  float largest, inverse;
};
struct alignas(16) RowPair {
  RowStatistics row[2];
};
struct alignas(8) WinnerPair {
  int32_t row[2];
};

// The work of a block. Two warpgroups have 64 neurons by 128 columns each: side by side along the
// neurons or, where there are only 64 of these, along the columns.
template <int NEURONS_, int COLUMNS_>
struct Shape {
  static constexpr int NEURONS = NEURONS_, COLUMNS = COLUMNS_;
  static constexpr int NEURON_BOXES = NEURONS / kBox, COLUMN_BOXES = COLUMNS / kBox;
  static constexpr int STAGE_BYTES = (COLUMN_BOXES + 2 * NEURON_BOXES) * kBoxBytes;
  static_assert(NEURONS * COLUMNS == 128 * 128 && (NEURONS == 64 || NEURONS == 128));

  struct Shared {
    alignas(1024) char boxes[kStages][STAGE_BYTES];
    RowPair statistics[kStages][kRows / 2];
    WinnerPair winner[kStages][kRows / 2];
    uint64_t full[kStages], empty[kStages], known[kStages];

    GHL_HOST_DEVICE char* x(int stage, int box) { return boxes[stage] + box * kBoxBytes; }
    GHL_HOST_DEVICE char* g(int stage, int box) { return x(stage, COLUMN_BOXES + box); }
    GHL_HOST_DEVICE char* y(int stage, int box) { return g(stage, NEURON_BOXES + box); }
  };

  GHL_HOST_DEVICE static int neuron_box(int warpgroup) { return NEURONS == 64 ? 0 : warpgroup; }
  GHL_HOST_DEVICE static int column_box(int warpgroup) { return NEURONS == 64 ? 2 * warpgroup : 0; }
};

// Where 16-byte chunk `chunk` of a row lies in its box, in bytes.
GHL_HOST_DEVICE int swizzled(int row, int chunk) {
  return row * 128 + (chunk ^ (row & 7)) * 16;
}

// What this lane tells ldmatrix.trans so that it receives, of 16 neurons by 16 rows, the first
// operand of a product: matrices 0 and 1 are the lower rows, 0 and 2 the lower neurons.
GHL_HOST_DEVICE int fragment_row(int lane, int first_row, int first_neuron) {
  const int matrix = lane / 8, row = first_row + matrix / 2 * 8 + lane % 8;
  return swizzled(row, first_neuron / 8 + matrix % 2);
}

// A wgmma operand in boxes whose numbers lie along its columns (MN-major, 128-byte swizzle). PTX
// ISA, "Strides" and "Matrix Descriptor Format" of wgmma: bits 0-13 address, 16-29 leading
// dimension offset (from a box to the next along the columns), 32-45 stride dimension offset (from
// eight rows to the next eight), each / 16; 62-63 swizzle, 1 for 128 bytes. The base offset is 0
// because boxes begin at multiples of 1024.
GHL_HOST_DEVICE uint64_t operand(uint32_t address) {
  constexpr uint64_t leading = kBoxBytes / 16, stride = 8 * 128 / 16;
  return (address & 0x3ffff) >> 4 | leading << 16 | stride << 32 | uint64_t{1} << 62;
}
// The same operand `rows` further down: a multiple of 8 keeps the swizzle.
GHL_HOST_DEVICE uint64_t advanced(uint64_t operand, int rows) {
  return operand + rows * 128 / 16;
}

// A place in the ring of stages, and the parity of its barriers' phases this time round.
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  GHL_HOST_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Where a sum goes: number i of a thread's 64 is of this neuron and column of its warpgroup.
GHL_HOST_DEVICE int neuron_of_sum(int thread, int i) {
  return thread % kWarpgroup / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
GHL_HOST_DEVICE int column_of_sum(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

// 64 columns of a tile: one tap, up to 64 channels of the group.
struct ColumnBox {
  int32_t tap, channel;

  // By how many pixels the tap lies off the first.
  GHL_HOST_DEVICE uint16_t off_h(const DualWgradParams& p) const {
    return uint16_t(tap / p.kernel_w * p.dilation_h);
  }
  GHL_HOST_DEVICE uint16_t off_w(const DualWgradParams& p) const {
    return uint16_t(tap % p.kernel_w * p.dilation_w);
  }
};

struct Geometry {
  int32_t taps, channel_boxes, column_boxes, column_tiles, neuron_tiles;

  GHL_HOST_DEVICE ColumnBox box(int32_t number) const {
    return {number / channel_boxes, number % channel_boxes * kBox};
  }
};

inline Geometry geometry(const DualWgradParams& p, int32_t tile_neurons, int32_t tile_columns) {
  Geometry g;
  g.taps = p.kernel_h * p.kernel_w;
  g.channel_boxes = (p.channels + kBox - 1) / kBox;
  g.column_boxes = g.taps * g.channel_boxes;
  g.column_tiles = (g.column_boxes + tile_columns / kBox - 1) / (tile_columns / kBox);
  g.neuron_tiles = (p.neurons + tile_neurons - 1) / tile_neurons;
  return g;
}

// The column of the weight's row, and how far the next channel's is.
GHL_HOST_DEVICE int32_t weight_column(const DualWgradParams& p, int32_t taps, ColumnBox box) {
  return p.channels_last ? box.tap * p.channels + box.channel : box.channel * taps + box.tap;
}
GHL_HOST_DEVICE int32_t channel_step(const DualWgradParams& p, int32_t taps) {
  return p.channels_last ? 1 : taps;
}

// The first pixels of patches, before a tap's offset, of every 64th output position.
struct Walk {
  int32_t n, h, w;                 // image, output line, output column
  int32_t step_n, step_h, step_w;  // what 64 positions are; carries are at most one

  GHL_HOST_DEVICE Walk(const DualWgradParams& p, int32_t row) {
    w = row % p.out_width, h = row / p.out_width % p.out_height;
    n = row / p.out_width / p.out_height;
    step_w = kRows % p.out_width, step_h = kRows / p.out_width % p.out_height;
    step_n = kRows / p.out_width / p.out_height;
  }
  GHL_HOST_DEVICE void advance(const DualWgradParams& p) {
    w += step_w, h += step_h, n += step_n;
    if (w >= p.out_width) w -= p.out_width, ++h;
    if (h >= p.out_height) h -= p.out_height, ++n;
  }
  GHL_HOST_DEVICE int32_t pixel_h(const DualWgradParams& p) const {
    return h * p.stride_h - p.padding_h;
  }
  GHL_HOST_DEVICE int32_t pixel_w(const DualWgradParams& p) const {
    return w * p.stride_w - p.padding_w;
  }
};

// Rows of a split: empty where there are more splits than rows.
GHL_HOST_DEVICE int32_t blocks_of_split(const DualWgradParams& p, int32_t split) {
  const int64_t first = int64_t(split) * p.rows_per_split;
  const int64_t left = p.rows - first;
  const int64_t rows = left < p.rows_per_split ? left : p.rows_per_split;
  return rows > 0 ? int32_t((rows + kRows - 1) / kRows) : 0;
}

}  // namespace ghl::cuda::sm90
