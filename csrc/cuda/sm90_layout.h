// The arithmetic of the sm_90a weight gradient: where everything lies in shared memory, and where
// sums go. All of it runs on a host as well.
//
// A box is 64 rows of 64 numbers of 16 bits, one copy of the copy engine: rows of 128 bytes, whose
// eight 16-byte chunks are permuted by the row's number (128-byte swizzle, "Swizzling Modes" of the
// PTX ISA), so that eight lanes with a row each meet no bank twice. A stage is boxes side by side:
// those of x, one of g and one of y, in whose place u comes.
#pragma once

#include "device.h"
#include "params.h"

namespace ghl::cuda::sm90 {

constexpr int kRows = 64, kBox = 64;
constexpr int kBoxBytes = kRows * kBox * 2;
constexpr int kDepth = 16;  // rows that one wgmma of 16-bit numbers sums over
constexpr int kWarpgroup = 128;
constexpr int kNeurons = kBox;           // of a block of threads
constexpr int kStageBytes = 216 * 1024;  // at most, of all stages together
constexpr int kWarps = kWarpgroup / 32;  // of a warpgroup
constexpr int kAhead = 3;                // chunks of rows that are made ahead, where u is exchanged

// A block's part of a tile: 64 neurons by so many boxes of columns. One warpgroup has the sums of
// G, one those of H0. The neurons of a cluster's blocks follow one another; their columns, and so
// the boxes of x, are the same.
template <int COLUMN_BOXES_, int CLUSTER_, bool EXCHANGES_ = false>
struct Shape {
  static constexpr int COLUMN_BOXES = COLUMN_BOXES_, COLUMNS = COLUMN_BOXES * kBox;
  static constexpr int CLUSTER = CLUSTER_;
  static constexpr bool EXCHANGES = EXCHANGES_;  // u, see sm90_exchange.h
  static constexpr int BOXES = COLUMN_BOXES + 2;
  static constexpr int STAGES = kStageBytes / (BOXES * kBoxBytes);
  static constexpr int SUMS = kNeurons * COLUMNS / kWarpgroup;  // of a thread
  // That make u: as many as registers allow beside the sums, since products slow each of them down.
  static constexpr int COMPETING_WARPS = (COLUMN_BOXES == 2 ? 7 : 3) + (EXCHANGES ? kWarps : 0);
  static constexpr int THREADS = (1 + COMPETING_WARPS) * 32 + 2 * kWarpgroup;
  // Registers of a thread: what the launch gives each, and what those have who multiply or make u.
  static constexpr int REGISTERS = 65536 / THREADS / 8 * 8;
  static constexpr int MULTIPLYING_REGISTERS = COLUMN_BOXES == 2                ? 120
                                               : COLUMN_BOXES == 3 && EXCHANGES ? 160
                                                                                : 176;
  static constexpr int COMPETING_REGISTERS =
      (THREADS * REGISTERS - 2 * kWarpgroup * MULTIPLYING_REGISTERS) / (THREADS - 2 * kWarpgroup) /
      8 * 8;

  struct Shared {
    alignas(1024) char boxes[STAGES][BOXES][kBoxBytes];
    float u_sums[2][COMPETING_WARPS][kNeurons];
    uint64_t full[STAGES], known[STAGES], empty[STAGES], summed;
    uint64_t given[kAhead], written[kAhead];  // chunks, where u is exchanged

    GHL_HOST_DEVICE char* x(int stage) { return boxes[stage][0]; }
    // g, and y or u
    GHL_HOST_DEVICE char* signal(int stage, int which) {
      return boxes[stage][COLUMN_BOXES + which];
    }
  };
};

// Where 16-byte chunk `chunk` of a row lies in its box, in bytes.
GHL_HOST_DEVICE int swizzled(int row, int chunk) {
  return row * 128 + (chunk ^ (row & 7)) * 16;
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
template <int STAGES>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  GHL_HOST_DEVICE int before() const { return (stage + STAGES - 1) % STAGES; }
  GHL_HOST_DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// Where a sum goes: number i of a thread is of this neuron and column of its tile.
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

// A tile's place among all: its group, its first neuron there and its first box of columns.
struct Place {
  int32_t group, neuron, box;
};

struct Geometry {
  int32_t taps, channel_boxes, column_boxes, column_tiles, neuron_tiles;
  int32_t tile_boxes, tile_neurons;

  GHL_HOST_DEVICE ColumnBox box(int32_t number) const {
    return {number / channel_boxes, number % channel_boxes * kBox};
  }
  // Tiles of the same neurons, which read the same rows of y and g, come one after another.
  GHL_HOST_DEVICE Place place(int32_t tile) const {
    const int32_t of_neurons = tile / column_tiles;
    return {of_neurons / neuron_tiles, of_neurons % neuron_tiles * tile_neurons,
            tile % column_tiles * tile_boxes};
  }
};

inline Geometry geometry(const DualWgradParams& p, int32_t tile_boxes, int32_t cluster) {
  Geometry g;
  g.tile_boxes = tile_boxes, g.tile_neurons = cluster * kNeurons;
  g.taps = p.kernel_h * p.kernel_w;
  g.channel_boxes = (p.channels + kBox - 1) / kBox;
  g.column_boxes = g.taps * g.channel_boxes;
  g.column_tiles = (g.column_boxes + tile_boxes - 1) / tile_boxes;
  g.neuron_tiles = (p.neurons + g.tile_neurons - 1) / g.tile_neurons;
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

}  // namespace ghl::cuda::sm90
