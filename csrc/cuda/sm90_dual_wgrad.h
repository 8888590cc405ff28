// G = gᵀx and H0 = uᵀx in one pass, for Hopper: TMA feeds wgmma, u is made in the place of y.
//
// Cost: 4·M·K·C FLOPs for M rows (output positions), K neurons, C = channels · taps; reads x once
// per tile of neurons (patches from L2 by the copy engine's im2col walk), y and g once per tile of
// columns, makes u as often, writes two K × C float32 sums per split. u exists in shared memory
// only. From L2 come, for 64 rows by 64 neurons by 256 columns, 48 KB; to a block of a cluster of
// two 32, since each copies every other box of x, to both.
// For: compute capability 9.0, 16-bit numbers, linear layers and convolutions on channels_last
// (`sm90_maps.h` says which). A tile is 64 neurons for each block of a cluster by boxes of one tap
// and up to 64 channels each.
//
// Three warpgroups or more, and none waits for its own latencies in turn. The first has the sums of
// G, the second those of H0. In the others, one lane of the first warp begins copies, and three
// warps, seven or eleven make u, 32 rows at a time in turn; it must not be a lane of these, whose
// fence might wait for its copies. A block of threads takes pieces of one tile after another
// (`sm90_schedule.h`); copies run ahead into the next piece while sums of the last are stored.
//
// No wait is in vain. Of each stage's barriers, `full` takes 1 arrival (the copying lane's, with
// its bytes), `known` one of every lane that makes u, whether or not of this block (racecheck
// follows the stores of lanes that arrive), `empty` 8 (multiplying warps). Block b of all pieces
// lies in stage b % STAGES and ends phase b / STAGES of its barriers. The copying lane waits for
// `empty` of b - STAGES, which multiplying warps release once they have begun the products of the
// block after it, or have ended its piece: for that they need no later block than b - STAGES + 1.
// Makers of u wait for `full`, multiplying warps for `full` and, those of H0, `known` of the same
// block; all wait for every block, in their order. Nobody falls two phases behind, since `full` of
// b + STAGES needs `empty` of b, and that all multiplying warps passed `full` and `known` of b, and
// that all makers of u passed `full` of b. All roles count the same blocks. Each copy is waited for
// before the block of threads ends. Registers, too, are waited for: some warpgroups give away what
// the others take.
//
// In a cluster all of this holds of its blocks together: multiplying warps arrive at the `empty` of
// every block, since every block copies into all. Bytes that come before their block has announced
// them are counted already. Nobody leaves before all blocks are done, because barriers and memory
// of one that has left are no longer there.
//
// Where u is exchanged (sm90_exchange.h), warps that make it do not wait for `full`: they write
// rows for all blocks, and the copying lane waits for those before it copies u. Such a block has
// one piece.
//
// Registers under a product: sums are touched by nothing else before the last wait of a piece.
//
// tests/csrc/test_sm90_dual_wgrad.cpp runs this file on the host by sm90_emulation.h. It cannot
// reach the hardware's reading of descriptors, tensor maps and fences, nor what the compiler does.
#pragma once

#include "sm90.h"
#include "sm90_competition.h"
#include "sm90_exchange.h"
#include "sm90_layout.h"
#include "sm90_schedule.h"

namespace ghl::cuda::sm90 {

struct DualWgradArguments {
  TensorMap x, y, g;
  DualWgradParams p;
  Geometry geometry;
  Schedule schedule;
  Exchange exchange;  // of a kernel that exchanges u: its map of y is that of the ring
  bool x_is_matrix;
};

template <class T, class Shape, Competition COMPETITION>
struct DualWgrad {
  static constexpr bool kCompetes = COMPETITION != Competition::linear;
  static constexpr bool kHasWinner = kCompetes && COMPETITION != Competition::softmax;
  static constexpr bool kExchanges = Shape::EXCHANGES;
  static constexpr int kCompetingWarps = Shape::COMPETING_WARPS;

  const DualWgradArguments& a;
  const DualWgradParams& p;
  typename Shape::Shared& shared;
  const int lane;
  Ring<Shape::STAGES> ring;
  int meetings = 0;  // of the warps that make u, over its sums

  GHL_DEVICE DualWgrad(const DualWgradArguments& arguments, typename Shape::Shared& memory)
      : a(arguments), p(arguments.p), shared(memory), lane(threadIdx.x % 32) {}

  GHL_DEVICE void run() {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Shape::STAGES; ++stage) {
        barrier_init(&shared.full[stage], 1);
        barrier_init(&shared.known[stage], 32 * kCompetingWarps);
        barrier_init(&shared.empty[stage], 2 * kWarps * Shape::CLUSTER);
      }
      barrier_init(&shared.summed, 32 * kCompetingWarps);
      for (int i = 0; i < kAhead; ++i) {
        barrier_init(&shared.given[i], 1);
        barrier_init(&shared.written[i], kCompetingWarps);
      }
      barriers_ready();
    }
    meet();
    const int warp = uniform(threadIdx.x / 32) - 2 * kWarps;
    if (warp < 0) {
      change_registers<Shape::REGISTERS, Shape::MULTIPLYING_REGISTERS>();
      multiply_and_store(warp < -kWarps ? 0 : 1);
      return leave();
    }
    change_registers<Shape::REGISTERS, Shape::COMPETING_REGISTERS>();
    if (warp > 0)
      kExchanges ? exchange_rows<T, kCompetingWarps>(p, a.exchange, first_piece(), a.schedule.tiles,
                                                     shared, warp - 1)
                 : compete(warp - 1);
    else if (lane == 0)
      copy();
    leave();
  }

  GHL_DEVICE void leave() const {
    if (Shape::CLUSTER > 1) meet();
  }

  // All threads of the cluster.
  GHL_DEVICE void meet() const {
    if (Shape::CLUSTER > 1)
      synchronize_cluster();
    else
      __syncthreads();
  }

  GHL_DEVICE Piece first_piece() const {
    return a.schedule.first_piece(blockIdx.x / Shape::CLUSTER);
  }

  // This block's number in its cluster.
  GHL_DEVICE int rank() const { return blockIdx.x % Shape::CLUSTER; }

  GHL_DEVICE Place place(const Piece& piece) const {
    Place tile = a.geometry.place(piece.tile);
    tile.neuron += rank() * kNeurons;
    return tile;
  }

  // The copying lane.
  GHL_DEVICE void copy() {
    prefetch_map(&a.x);
    prefetch_map(&a.y);
    prefetch_map(&a.g);
    Piece piece = first_piece();
    for (; piece.blocks > 0; piece = a.schedule.next_piece(piece)) copy_piece(piece);
  }

  // Boxes beyond the last column are not copied: what lies there ends in sums that nobody stores.
  // The blocks of a cluster take turns with those of x.
  GHL_DEVICE void copy_piece(const Piece& piece) {
    const Place tile = place(piece);
    const int x_boxes = min(Shape::COLUMN_BOXES, a.geometry.column_boxes - tile.box);
    const int32_t neuron = tile.group * p.neurons + tile.neuron;
    int32_t channel[Shape::COLUMN_BOXES];
    uint16_t off_h[Shape::COLUMN_BOXES], off_w[Shape::COLUMN_BOXES];
    GHL_UNROLL
    for (int i = 0; i < Shape::COLUMN_BOXES; ++i) {
      const ColumnBox box = a.geometry.box(tile.box + i);
      channel[i] = tile.group * p.channels + box.channel;
      off_h[i] = box.off_h(p), off_w[i] = box.off_w(p);
    }
    Walk walk(p, piece.first * kRows);
    for (int block = 0; block < piece.blocks; ++block) {
      const int stage = ring.stage, row = (piece.first + block) * kRows;
      uint64_t* full = &shared.full[stage];
      barrier_wait(&shared.empty[stage], ring.parity ^ 1);
      barrier_expect(full, (x_boxes + 2) * kBoxBytes);
      if (!kExchanges) load_box<1>(shared.signal(stage, 1), &a.y, full, neuron, row);
      load_box<1>(shared.signal(stage, 0), &a.g, full, neuron, row);
      const int32_t h = walk.pixel_h(p), w = walk.pixel_w(p);
      GHL_UNROLL
      for (int i = 0; i < Shape::COLUMN_BOXES; ++i) {
        if (i >= x_boxes) break;
        if (i % Shape::CLUSTER != rank()) continue;
        char* box = shared.x(stage) + i * kBoxBytes;
        if (a.x_is_matrix)
          load_box<Shape::CLUSTER>(box, &a.x, full, channel[i], row);
        else
          load_patches<Shape::CLUSTER>(box, &a.x, full, channel[i], w, h, walk.n, off_w[i],
                                       off_h[i]);
      }
      if (kExchanges) {
        if (block % kChunk == 0) a.exchange.wait_for(piece.part, block / kChunk, a.schedule.tiles);
        load_box<1>(shared.signal(stage, 1), &a.y, full, neuron,
                    a.exchange.row(piece.part, block * kRows));
      }
      ring.advance();
      walk.advance(p);
    }
  }

  // A warp that makes u. Of as many units as there are such warps, each of 32 rows, one a lane, one
  // is its own: the next is `unit`, counted from the piece's first.
  GHL_DEVICE void compete(int turn) {
    int unit = turn;
    Piece piece = first_piece();
    for (; piece.blocks > 0; piece = a.schedule.next_piece(piece)) {
      const Place tile = place(piece);
      const bool sums_u = p.u_sums && tile.box == 0;
      float2 u_sums = {0.0f, 0.0f};  // of neurons 2 · lane and 2 · lane + 1
      // two units ahead: the fence waits for what was begun before it
      RowStatistics of = given(piece, unit), next = given(piece, unit + kCompetingWarps);
      for (int block = 0; block < piece.blocks; ++block) {
        barrier_wait(&shared.full[ring.stage], ring.parity);
        if (unit / 2 == block) {
          compete_in_unit(piece, tile, unit, of);
          if (sums_u) add_u(u_sums, shared.signal(ring.stage, 1), unit % 2 * 32);
          of = next, next = given(piece, unit + 2 * kCompetingWarps);
          unit += kCompetingWarps;
        }
        barrier_arrive(&shared.known[ring.stage]);
        ring.advance();
      }
      unit -= 2 * piece.blocks;
      if (sums_u) store_u(u_sums, piece, tile, turn);
    }
  }

  GHL_DEVICE void compete_in_unit(const Piece& piece, const Place& tile, int unit,
                                  const RowStatistics& of) {
    if (!kCompetes) return;
    char* box = shared.signal(ring.stage, 1);
    const int row = unit % 2 * 32 + lane;
    const bool find = Shape::CLUSTER == 1 && !p.statistics.largest,
               there = row_of(piece, unit) < p.rows;
    Row numbers;
    numbers.load(box, row);
    if (find) numbers.cut(p.neurons, T{});
    compete_in_row<T, COMPETITION>(numbers, of, find, there, tile.group * p.neurons + tile.neuron,
                                   p.scale);
    numbers.store(box, row);
    shared_written();
    __syncwarp();
  }

  // The row of a unit that this lane has, among all of the layer.
  GHL_DEVICE int64_t row_of(const Piece& piece, int unit) const {
    return int64_t(piece.first) * kRows + unit * 32 + lane;
  }

  // The statistics of a row as they were given; of rows that are not there, nothing is read.
  GHL_DEVICE RowStatistics given(const Piece& piece, int unit) const {
    const int64_t at = row_of(piece, unit);
    if (!p.statistics.largest || unit >= 2 * piece.blocks || at >= p.rows) return {0.0f, 0.0f, -1};
    return {p.statistics.largest[at], p.statistics.inverse[at],
            kHasWinner ? p.statistics.winner[at] : -1};
  }

  // This warp is done with what the barrier stands for, in every block of the cluster. Each warp
  // says so of itself: a wait for products, too, is a warp's own.
  GHL_DEVICE void arrive(uint64_t* barrier) {
    __syncwarp();
    if (lane >= Shape::CLUSTER) return;
    if (Shape::CLUSTER > 1)
      barrier_arrive_at(barrier, lane);
    else
      barrier_arrive(barrier);
  }

  // The sums of a unit's u; rows that are not there have none.
  GHL_DEVICE void add_u(float2& sums, const char* box, int first_row) const {
    for (int row = 0; row < 32; ++row) {
      uint32_t pair;
      std::memcpy(&pair, box + swizzled(first_row + row, lane / 4) + lane % 4 * 4, 4);
      const float2 both = unpack(pair, T{});
      sums.x += both.x, sums.y += both.y;
    }
  }

  // The warps' sums meet in shared memory. Those of two pieces have places there: nobody writes the
  // third's before all have read the first's.
  GHL_DEVICE void store_u(const float2& sums, const Piece& piece, const Place& tile, int turn) {
    auto& meeting = shared.u_sums[meetings % 2];
    meeting[turn][2 * lane] = sums.x, meeting[turn][2 * lane + 1] = sums.y;
    barrier_arrive(&shared.summed);
    barrier_wait(&shared.summed, meetings++ % 2);
    for (int of = turn * 32 + lane; of < kNeurons; of += 32 * kCompetingWarps) {
      float sum = 0.0f;
      for (int other = 0; other < kCompetingWarps; ++other) sum += meeting[other][of];
      if (tile.neuron + of >= p.neurons) break;
      for (int part = piece.part; part < parts_until(piece); ++part, sum = 0.0f)
        p.u_sums[first_of_part(part, tile.group) + tile.neuron + of] = sum;
    }
  }

  // The warps that multiply: of G, or of H0.
  GHL_DEVICE void multiply_and_store(int which) {
    Piece piece = first_piece();
    for (; piece.blocks > 0; piece = a.schedule.next_piece(piece)) {
      float sums[Shape::SUMS] = {};
      multiply_piece(sums, piece.blocks, which);
      const Place tile = place(piece);
      for (int part = piece.part;;) {
        store(which ? p.H0 : p.G, sums, tile, part);
        if (++part >= parts_until(piece)) break;
        GHL_UNROLL
        for (int i = 0; i < Shape::SUMS; ++i) sums[i] = 0.0f;
      }
    }
  }

  GHL_DEVICE void multiply_piece(float (&sums)[Shape::SUMS], int blocks, int which) {
    for (int block = 0; block < blocks; ++block) {
      const int stage = ring.stage;
      const uint64_t x = operand(shared_address(shared.x(stage)));
      const uint64_t signal = operand(shared_address(shared.signal(stage, which)));
      barrier_wait(&shared.full[stage], ring.parity);
      if (kExchanges && threadIdx.x == 0 && block % kChunk == kChunk - 1)
        barrier_arrive(&shared.given[block / kChunk % kAhead]);
      if (!kExchanges && which) barrier_wait(&shared.known[stage], ring.parity);
      products_fence();
      GHL_UNROLL
      for (int row = 0; row < kRows; row += kDepth)
        multiply(sums, advanced(signal, row), advanced(x, row), T{});
      products_commit();
      products_wait<1>();
      if (block > 0) arrive(&shared.empty[ring.before()]);
      ring.advance();
    }
    products_wait<0>();
    hold(sums);
    arrive(&shared.empty[ring.before()]);
  }

  // Beyond the last part that a piece fills: its own or, if it ends its tile, all that follow.
  GHL_DEVICE int parts_until(const Piece& piece) const {
    return piece.ends ? a.schedule.parts : piece.part + 1;
  }

  GHL_DEVICE int64_t first_of_part(int part, int32_t group) const {
    return (int64_t(part) * p.groups + group) * p.neurons;
  }

  GHL_DEVICE void store(float* to, const float (&sums)[Shape::SUMS], const Place& tile, int part) {
    // neighbouring columns lie side by side in the weight, and at multiples of 8 bytes
    if (channel_step(p, a.geometry.taps) == 1 && p.channels % 2 == 0)
      store_sums<true>(to, sums, tile, part);
    else
      store_sums<false>(to, sums, tile, part);
  }

  template <bool PAIRS>
  GHL_DEVICE void store_sums(float* to, const float (&sums)[Shape::SUMS], const Place& tile,
                             int part) {
    const int32_t taps = a.geometry.taps, step = PAIRS ? 1 : channel_step(p, taps);
    const int thread = threadIdx.x % kWarpgroup;
    GHL_UNROLL
    for (int of_tile = 0; of_tile < Shape::COLUMN_BOXES; ++of_tile) {
      const int number = tile.box + of_tile;
      if (number >= a.geometry.column_boxes) break;
      const ColumnBox box = a.geometry.box(number);
      GHL_UNROLL
      for (int upper = 0; upper < 2; ++upper) {
        const int32_t neuron = tile.neuron + neuron_of_sum(thread, 2 * upper);
        if (neuron >= p.neurons) continue;
        float* row = to +
                     (first_of_part(part, tile.group) + neuron) * (int64_t(taps) * p.channels) +
                     weight_column(p, taps, box);
        GHL_UNROLL
        for (int i = 0; i < kBox / 8; ++i) {
          const int sum = of_tile * 32 + i * 4 + upper * 2, c = column_of_sum(thread, i * 4);
          const int32_t left = p.channels - box.channel - c;
          if (PAIRS) {
            if (left > 0) *reinterpret_cast<float2*>(row + c) = {sums[sum], sums[sum + 1]};
          } else {
            if (left > 0) row[c * step] = sums[sum];
            if (left > 1) row[(c + 1) * step] = sums[sum + 1];
          }
        }
      }
    }
  }
};

template <class T, class Shape, Competition COMPETITION>
GHL_KERNEL void GHL_LAUNCH_BOUNDS(Shape::THREADS, 1)
    dual_wgrad_kernel(GHL_CONSTANT_ARGUMENT DualWgradArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_memory());
  DualWgrad<T, Shape, COMPETITION>(arguments, shared).run();
#endif
}

}  // namespace ghl::cuda::sm90
