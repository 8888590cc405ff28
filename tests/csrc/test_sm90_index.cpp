// The arithmetic of sm90_layout.h and sm90_maps.h, each against its definition.
#include <algorithm>
#include <random>
#include <set>
#include <string>

#include "../../csrc/cuda/sm90.h"
#include "../../csrc/cuda/sm90_maps.h"
#include "../../csrc/cuda/sm90_schedule.h"
#include "check.h"

namespace ghl::cuda::sm90 {
namespace {

void equal(const char* test, const char* what, int64_t index, double got, double wanted) {
  check::near(test, what, index, got, wanted, 0);
}

DualWgradParams layer(int images, int channels, int neurons, const int (&in)[2],
                      const int (&kernel)[2], const int (&stride)[2], const int (&padding)[2],
                      const int (&dilation)[2]) {
  static const uint4 data[1] = {};
  DualWgradParams p{};
  p.dtype = Dtype::bfloat16, p.groups = 1, p.channels = channels, p.neurons = neurons;
  p.in_height = in[0], p.in_width = in[1];
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  p.dilation_h = dilation[0], p.dilation_w = dilation[1];
  p.out_height = (in[0] + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) / stride[0] + 1;
  p.out_width = (in[1] + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) / stride[1] + 1;
  p.rows = images * p.out_height * p.out_width;
  p.x = {data, int64_t(channels) * in[0] * in[1], 1, int64_t(channels) * in[1], channels};
  p.y = p.g = {data, neurons, 1};
  static float largest;
  p.statistics.largest = &largest;
  p.splits = 1, p.rows_per_split = (p.rows + kRows - 1) / kRows * kRows;
  return p;
}

DualWgradParams linear(int rows, int channels, int neurons) {
  return layer(rows, channels, neurons, {1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, 1});
}

// PTX ISA, "Swizzling Modes": 16-byte chunks of a row of 128 bytes, exchanged within eight rows.
void test_swizzle() {
  std::set<int> places;
  for (int row = 0; row < kRows; ++row) {
    for (int chunk = 0; chunk < 8; ++chunk) {
      const int linear = row * 128 + chunk * 16;
      equal("swizzle", "chunk", linear, swizzled(row, chunk), linear ^ (linear >> 7 & 7) << 4);
      places.insert(swizzled(row, chunk));
    }
  }
  equal("swizzle", "places", 0, places.size(), kBoxBytes / 16);
  // eight lanes of an access of 16 bytes each meet all banks: one row, or one chunk of eight rows
  for (int chunk = 0; chunk < 8; ++chunk) {
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(swizzled(row, chunk) % 128);
    equal("swizzle", "banks of a chunk", chunk, banks.size(), 8);
  }
}

void test_operand() {
  const uint64_t at = operand(0x2c400);
  equal("operand", "address", 0, at & 0x3fff, 0x2c400 / 16);
  equal("operand", "from box to box", 0, at >> 16 & 0x3fff, kBoxBytes / 16);
  equal("operand", "from eight rows to eight", 0, at >> 32 & 0x3fff, 1024 / 16);
  equal("operand", "base offset", 0, at >> 49 & 7, 0);
  equal("operand", "swizzle", 0, at >> 62, 1);
  equal("operand", "rows further", 0, advanced(at, 48), operand(0x2c400 + 48 * 128));
}

// Wherever a ring begins again, a waiting parity is that of the phase the arrivals end.
void test_ring() {
  Ring<5> ring;
  for (int block = 0; block < 25; ++block) {
    equal("ring", "stage", block, ring.stage, block % 5);
    equal("ring", "stage before", block, ring.before(), (block + 4) % 5);
    equal("ring", "parity", block, ring.parity, block / 5 % 2);
    ring.advance();
  }
}

void test_sums() {
  std::set<std::pair<int, int>> places;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < Shape<4, 1>::SUMS; ++i)
      places.insert({neuron_of_sum(thread, i), column_of_sum(thread, i)});
  }
  equal("sums", "places", 0, places.size(), 64 * 256);
  equal("sums", "last neuron", 0, places.rbegin()->first, 63);
  equal("sums", "last column", 0, places.rbegin()->second, 255);
}

// Every block of rows of every tile is in one piece, the pieces of a block of threads are at most a
// share, and a tile's parts, with what its last piece fills, are all there are.
void check_schedule(int32_t rows, int32_t tiles, int32_t share, int32_t parts, bool strung) {
  DualWgradParams p = linear(rows, 8, 64);
  p.rows_per_split = share * kRows, p.splits = parts;
  Geometry g = geometry(p, 4, 1);
  g.neuron_tiles = tiles;
  const Schedule s = schedule(p, g);
  equal("schedule", "tiles", tiles, s.tiles, tiles);
  equal("schedule", "strung", tiles, s.strung, strung);
  std::vector<std::vector<int>> rows_seen(tiles, std::vector<int>(s.blocks));
  std::vector<std::vector<int>> parts_seen(tiles, std::vector<int>(parts));
  for (int64_t block = 0; block < s.blocks_of_threads(); ++block) {
    int32_t work = 0;
    for (Piece piece = s.first_piece(int32_t(block)); piece.blocks; piece = s.next_piece(piece)) {
      for (int i = 0; i < piece.blocks; ++i) ++rows_seen[piece.tile][piece.first + i];
      const bool ends = piece.first + piece.blocks == s.blocks;
      equal("schedule", "ends", block, piece.ends, ends);
      for (int part = piece.part; part < (ends ? parts : piece.part + 1); ++part)
        ++parts_seen[piece.tile][part];
      work += piece.blocks;
    }
    equal("schedule", "work", block, work > 0 && work <= share, true);
  }
  for (int tile = 0; tile < tiles; ++tile) {
    for (int block = 0; block < s.blocks; ++block)
      equal("schedule", "times", block, rows_seen[tile][block], 1);
    for (int part = 0; part < parts; ++part)
      equal("schedule", "filled", part, parts_seen[tile][part], 1);
  }
}

void test_schedule() {
  check_schedule(1000, 3, 6, 3, false);
  check_schedule(1000, 3, 6, 4, true);  // three shares, the last of 4 blocks, or 2 and a rest
  check_schedule(64 * 784, 36, 214, 5, true);
  check_schedule(64 * 196, 144, 214, 2, true);
  check_schedule(64 * 196, 144, 196, 1, false);
  check_schedule(1, 5, 3, 2, true);
  check_schedule(640, 2, 5, 3, true);  // no rest, and a part that nobody needs
  std::mt19937 random(5);
  for (int trial = 0; trial < 300; ++trial) {
    const int rows = int(random() % 4000) + 1, tiles = int(random() % 9) + 1;
    const int share = int(random() % 80) + 1, blocks = (rows + kRows - 1) / kRows;
    const int shares = (blocks + share - 1) / share;
    check_schedule(rows, tiles, share, shares, false);
    check_schedule(rows, tiles, share, std::max(shares + 1, strung_parts(blocks, share)), true);
  }
  DualWgradParams p = linear(1000, 8, 64);
  const auto covers = [&](int32_t share, int32_t parts) {
    p.rows_per_split = share * kRows, p.splits = parts;
    return schedule(p, geometry(p, 4, 1)).tiles > 0;
  };
  equal("schedule", "too few parts", 0, covers(6, 2), false);
  equal("schedule", "no share", 0, covers(0, 2), false);
  p.rows = INT32_MAX - 65536, p.rows_per_split = 1 << 30, p.splits = 2;
  const Schedule s = schedule(p, geometry(p, 4, 1));
  equal("schedule", "blocks of many rows", 0, s.first_piece(1).blocks,
        ((1 << 30) - 65536 + 62) / 64);
}

// All boxes together are all columns of the weight, once.
void test_columns() {
  for (bool channels_last : {true, false}) {
    DualWgradParams p = layer(1, 200, 8, {9, 9}, {3, 2}, {1, 1}, {0, 0}, {1, 1});
    p.channels_last = channels_last;
    const Geometry g = geometry(p, 4, 1);
    equal("columns", "tiles", 0, g.column_tiles, 6);
    std::vector<int> seen(1200);
    for (int number = 0; number < g.column_boxes; ++number) {
      const ColumnBox box = g.box(number);
      for (int c = 0; c < std::min(kBox, p.channels - box.channel); ++c) {
        const int column = weight_column(p, g.taps, box) + c * channel_step(p, g.taps);
        const int channel = box.channel + c;
        equal("columns", "place", column, column,
              channels_last ? box.tap * 200 + channel : channel * 6 + box.tap);
        ++seen[column];
      }
      equal("columns", "off_h", number, box.off_h(p), box.tap / 2);
      equal("columns", "off_w", number, box.off_w(p), box.tap % 2);
    }
    for (int column = 0; column < 1200; ++column)
      equal("columns", "times", column, seen[column], 1);
  }
}

// What lies in a box after a copy, against the patches of a convolution, over random layers.
void test_patches() {
  std::mt19937 random(3);
  const auto upto = [&](int most) { return int(random() % most) + 1; };
  for (int trial = 0; trial < 300; ++trial) {
    const int kernel[2] = {upto(4), upto(4)}, dilation[2] = {upto(3), upto(3)};
    const int padding[2] = {upto(4) - 1, upto(4) - 1}, stride[2] = {upto(8), upto(3)};
    int in[2];
    for (int d = 0; d < 2; ++d) {
      const int span = (kernel[d] - 1) * dilation[d] + 1;
      in[d] = std::max(1, span - 2 * padding[d]) + upto(trial % 3 ? 20 : 100) - 1;
    }
    const int images = upto(5), channels = 8;
    DualWgradParams p = layer(images, channels, 8, in, kernel, stride, padding, dilation);
    std::vector<uint4> memory(images * in[0] * in[1]);
    auto* numbers = reinterpret_cast<uint16_t*>(memory.data());
    for (size_t i = 0; i < memory.size() * 8; ++i) numbers[i] = uint16_t(random() | 1);
    p.x.data = numbers;
    if (const char* why = images_unfit(p)) emulated::fail(why);
    const MapOfImages of = map_of_images(p);
    TensorMap map{of.data, {}, {}, {}, {}, {}};
    std::copy_n(of.sizes, 4, map.sizes);
    std::copy_n(of.strides, 3, map.strides);
    std::copy_n(of.lower, 2, map.lower);
    std::copy_n(of.upper, 2, map.upper);
    std::copy_n(of.steps, 4, map.steps);
    emulation::launch({}, 32, kBoxBytes + 8, [&] {
      if (threadIdx.x != 0) return;
      auto* barrier = reinterpret_cast<uint64_t*>(shared_memory() + kBoxBytes);
      barrier_init(barrier, 1000);
      Walk walk(p, 0);
      for (int row = 0; row < p.rows; row += kRows, walk.advance(p)) {
        const ColumnBox tap{int32_t(random() % (kernel[0] * kernel[1])), 0};
        load_patches<1>(shared_memory(), &map, barrier, 0, walk.pixel_w(p), walk.pixel_h(p), walk.n,
                        tap.off_w(p), tap.off_h(p));
        for (int r = 0; r < kRows; ++r) {
          const int position = (row + r) % (p.out_height * p.out_width);
          const int n = (row + r) / (p.out_height * p.out_width);
          const int h = position / p.out_width * stride[0] - padding[0] + tap.off_h(p);
          const int w = position % p.out_width * stride[1] - padding[1] + tap.off_w(p);
          const bool inside = h >= 0 && w >= 0 && h < in[0] && w < in[1] && row + r < p.rows;
          uint16_t got;
          std::memcpy(&got, shared_memory() + swizzled(r, 0), 2);
          equal("patches", "number", trial * 1000000 + row + r, got,
                inside ? numbers[((n * in[0] + h) * in[1] + w) * channels] : 0);
        }
      }
    });
  }
}

void test_matrices() {
  DualWgradParams p = layer(3, 24, 40, {5, 7}, {1, 1}, {1, 1}, {0, 0}, {1, 1});
  equal("matrices", "dense 1x1", 0, row_stride_of_x(p), 24);
  p.x.width = 32, p.x.height = 7 * 32, p.x.image = 35 * 32;
  equal("matrices", "a slice of channels", 0, row_stride_of_x(p), 32);
  p.x.height = 8 * 32;
  equal("matrices", "a slice of the width", 0, row_stride_of_x(p), 0);
  equal("matrices", "stride 2", 0,
        row_stride_of_x(layer(3, 24, 40, {5, 7}, {1, 1}, {2, 2}, {0, 0}, {1, 1})), 0);
  equal("matrices", "padding", 0,
        row_stride_of_x(layer(3, 24, 40, {5, 7}, {1, 1}, {1, 1}, {0, 1}, {1, 1})), 0);
  p = linear(9, 24, 40);
  p.x.height = p.x.width = 7;  // strides of dimensions of one
  equal("matrices", "linear", 0, row_stride_of_x(p), 24);
  p = linear(1, 20, 40);
  p.x.image = 3, p.y.row = 5, p.g.row = 0;
  equal("matrices", "one row", 0, unfit(p) == nullptr, true);
  equal("matrices", "stride of one row", 0, map_of_rows(p).strides[0], 48);
}

void test_unfit() {
  const auto fits = [](const char* what, DualWgradParams p, bool wanted) {
    equal("unfit", what, 0, unfit(p) == nullptr, wanted);
  };
  DualWgradParams p = linear(70, 24, 40);
  fits("linear", p, true);
  p.dtype = Dtype::float32, fits("float32", p, false), p.dtype = Dtype::float16;
  p.y.row = 44, fits("rows of y at 8 bytes", p, false), p.y.row = 48, fits("padded y", p, true);
  p.g.row = 0, fits("expanded g", p, false), p.g.row = 40;
  p.g.column = 2, fits("strided g", p, false), p.g.column = 1;
  p.x.channel = 2, fits("NCHW", p, false), p.x.channel = 1;
  p.x.data = static_cast<const char*>(p.x.data) + 2, fits("x off 16 bytes", p, false);
  p = linear(70, 24, 40), p.statistics.largest = nullptr, fits("statistics in the tile", p, true);
  p.neurons = p.y.row = p.g.row = 72, fits("too many neurons", p, false);
  p.competition = Competition::linear, fits("no statistics needed", p, true);
  p = linear(70, 20, 40), p.statistics.largest = nullptr, fits("x rows at 8 bytes", p, false);
  p = linear(70, 24, 36), p.y.row = p.g.row = 40, fits("neurons no multiple of 8", p, true);
  p.statistics.largest = nullptr, fits("the same in the tile", p, false);
  fits("stem", layer(2, 3, 64, {32, 32}, {7, 7}, {2, 2}, {3, 3}, {1, 1}), false);
  p = layer(2, 64, 64, {35, 32}, {4, 1}, {1, 1}, {0, 0}, {1, 1});
  p.x.width = 16, p.x.height = 70 * 8, p.x.image = 35 * 70 * 8;
  fits("the stem folded", p, true);
  fits("stride 8", layer(2, 8, 8, {32, 32}, {2, 2}, {8, 8}, {0, 0}, {1, 1}), true);
  fits("stride 9", layer(2, 8, 8, {32, 32}, {2, 2}, {9, 1}, {0, 0}, {1, 1}), false);
  fits("a long kernel", layer(2, 8, 8, {300, 300}, {3, 3}, {1, 1}, {64, 64}, {64, 64}), true);
  fits("too long a kernel", layer(2, 8, 8, {300, 300}, {3, 3}, {1, 1}, {0, 0}, {65, 65}), false);
  fits("too far a tap", layer(2, 8, 8, {300, 300}, {3, 3}, {1, 1}, {129, 129}, {129, 129}), false);
  p = layer(2, 8, 8, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}), p.x.image = 0;
  fits("expanded x", p, false);
  p = layer(2, 8, 16, {6, 6}, {3, 3}, {1, 1}, {1, 1}, {1, 1}), p.groups = 2,
  fits("groups", p, true);
  p.neurons = 20, fits("groups of 20 neurons", p, false), p.neurons = 16;
  p.channels = 12, fits("groups of 12 channels", p, false);
}

}  // namespace
}  // namespace ghl::cuda::sm90

int main() {
  using namespace ghl::cuda::sm90;
  test_swizzle();
  test_operand();
  test_ring();
  test_sums();
  test_schedule();
  test_columns();
  test_patches();
  test_matrices();
  test_unfit();
  return check::result();
}
