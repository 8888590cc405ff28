// G = gᵀx and H0 = uᵀx in one pass, for Hopper: TMA feeds wgmma, u is a register operand of it.
//
// Cost: 4·M·K·C FLOPs for M rows (output positions), K neurons, C = channels · taps; reads x once
// per tile of neurons (patches from L2 by the copy engine's im2col walk), y and g once per tile of
// columns, writes two K × C float32 sums per split. u exists only in registers.
// For: compute capability 9.0, 16-bit numbers, linear layers and convolutions on channels_last
// (`sm90_maps.h` says which). A tile of columns is boxes of one tap and up to 64 channels each.
//
// Three warpgroups. In the first, one lane begins copies, and 64 lanes find or fetch the statistics
// of a row each; the two others multiply: of every stage of 64 rows first the product of g, which
// both operands of lie in shared memory; beside it u is made from y, then the product of u.
//
// No wait is in vain. Of each stage's barriers, `full` takes 1 arrival (the copying lane's, with
// its bytes), `known` 64 (describers), `empty` 8 (multiplying warps). Block b of a split lies in
// stage b % 4 and ends phase b / 4 of its barriers. The copying lane waits for `empty` from block 4
// on, for the phase of block b - 4: the multiplying warps release that once `full` of b - 3 came,
// which needs no later block. Describers wait for `full` only, multiplying warps for `full` and
// `known` of the same block. Nobody falls two phases behind, since `full` of b + 4 needs `empty` of
// b, that all multiplying warps passed `known` of b, and that all describers passed `full` of b.
// All roles count the same blocks; with none, nobody waits and zeros are stored. Each copy is
// waited for before the block ends. Registers, too, are waited for: the first warpgroup gives away
// what the others take.
//
// Registers under a product: G and H0 are touched by nothing else before the last wait. u of block
// b is made after the product of u of b - 1 was waited for, and `hold` keeps its registers its own
// until then.
//
// tests/csrc/test_sm90_dual_wgrad.cpp runs this file on the host by sm90_emulation.h. It cannot
// reach the hardware's reading of descriptors, tensor maps and fences, nor what the compiler does.
#pragma once

#include "sm90.h"
#include "sm90_competition.h"
#include "sm90_layout.h"

namespace ghl::cuda::sm90 {

struct DualWgradArguments {
  TensorMap x, y, g;
  DualWgradParams p;
  Geometry geometry;
  bool x_is_matrix;
};

// Registers of a thread after the launch, which gives 168 to each of three warpgroups.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);

template <class T, class Shape, Competition COMPETITION>
struct DualWgrad {
  using Shared = typename Shape::Shared;
  static constexpr bool kCompetes = COMPETITION != Competition::linear;
  static constexpr bool kHasWinner = kCompetes && COMPETITION != Competition::softmax;

  const DualWgradArguments& a;
  const DualWgradParams& p;
  Shared& shared;
  const int thread, lane, warp;
  const int32_t first_neuron, first_box, first_row, blocks;

  GHL_DEVICE DualWgrad(const DualWgradArguments& arguments, Shared& memory)
      : a(arguments),
        p(arguments.p),
        shared(memory),
        thread(threadIdx.x),
        lane(threadIdx.x % 32),
        warp(uniform(threadIdx.x / 32)),
        first_neuron(blockIdx.x / a.geometry.column_tiles * Shape::NEURONS),
        first_box(blockIdx.x % a.geometry.column_tiles * Shape::COLUMN_BOXES),
        first_row(blockIdx.y * p.rows_per_split),
        blocks(blocks_of_split(p, blockIdx.y)) {}

  GHL_DEVICE void run() {
    if (thread == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        barrier_init(&shared.full[stage], 1);
        barrier_init(&shared.empty[stage], 2 * kWarpgroup / 32);
        barrier_init(&shared.known[stage], kDescribers);
      }
      barriers_ready();
    }
    __syncthreads();
    if (warp < kWarpgroup / 32) {
      give_registers<kProducerRegisters>();
      if (warp == 0 && lane == 0) copy();
      if (kCompetes && (warp == 1 || warp == 2)) describe(thread - 32);
    } else {
      take_registers<kConsumerRegisters>();
      multiply_and_store(warp / 4 - 1);
    }
  }

  // The copying lane. Boxes beyond the last column or neuron are not copied: what lies there ends
  // in sums that nobody stores.
  GHL_DEVICE void copy() {
    const int x_boxes = min(Shape::COLUMN_BOXES, a.geometry.column_boxes - first_box);
    const int y_boxes = min(Shape::NEURON_BOXES, (p.neurons - first_neuron + kBox - 1) / kBox);
    const int32_t neuron = blockIdx.z * p.neurons + first_neuron;
    int32_t channel[Shape::COLUMN_BOXES];
    uint16_t off_h[Shape::COLUMN_BOXES], off_w[Shape::COLUMN_BOXES];
    GHL_UNROLL
    for (int i = 0; i < Shape::COLUMN_BOXES; ++i) {
      const ColumnBox box = a.geometry.box(first_box + i);
      channel[i] = blockIdx.z * p.channels + box.channel;
      off_h[i] = box.off_h(p), off_w[i] = box.off_w(p);
    }
    prefetch_map(&a.x);
    prefetch_map(&a.y);
    prefetch_map(&a.g);
    Ring ring;
    Walk walk(p, first_row);
    for (int block = 0; block < blocks; ++block) {
      const int stage = ring.stage, row = first_row + block * kRows;
      uint64_t* full = &shared.full[stage];
      barrier_wait(&shared.empty[stage], ring.parity ^ 1);
      barrier_expect(full, (x_boxes + 2 * y_boxes) * kBoxBytes);
      const int32_t h = walk.pixel_h(p), w = walk.pixel_w(p);
      GHL_UNROLL
      for (int i = 0; i < Shape::COLUMN_BOXES; ++i) {
        if (i >= x_boxes) break;
        if (a.x_is_matrix)
          load_box(shared.x(stage, i), &a.x, full, channel[i], row);
        else
          load_patches(shared.x(stage, i), &a.x, full, channel[i], w, h, walk.n, off_w[i],
                       off_h[i]);
      }
      GHL_UNROLL
      for (int i = 0; i < Shape::NEURON_BOXES; ++i) {
        if (i >= y_boxes) break;
        load_box(shared.g(stage, i), &a.g, full, neuron + i * kBox, row);
        load_box(shared.y(stage, i), &a.y, full, neuron + i * kBox, row);
      }
      ring.advance();
      walk.advance(p);
    }
  }

  struct Described {
    RowStatistics statistics;
    int32_t winner;
  };

  // The statistics of a row as they were given; 0 as the inverse, and so u = 0, beyond the last
  // row.
  GHL_DEVICE Described given(int block, int row) const {
    const int64_t at = int64_t(first_row) + block * kRows + row;
    if (!p.statistics.largest || block >= blocks || at >= p.rows) return {{0.0f, 0.0f}, -1};
    return {{p.statistics.largest[at], p.statistics.inverse[at]},
            kHasWinner ? p.statistics.winner[at] : -1};
  }

  // Finds or fetches the statistics of a row of every block, and puts them beside the block.
  GHL_DEVICE void describe(int row) {
    constexpr int kAtOnce = 2;  // blocks that are fetched together: a fetch may outlast a block
    Ring ring;
    for (int first = 0; first < blocks; first += kAtOnce) {
      Described described[kAtOnce];
      GHL_UNROLL
      for (int i = 0; i < kAtOnce; ++i) described[i] = given(first + i, row);
      GHL_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= blocks) break;
        Described& d = described[i];
        barrier_wait(&shared.full[ring.stage], ring.parity);
        if (!p.statistics.largest && first_row + (first + i) * kRows + row < p.rows)
          d.statistics = find_statistics<T, COMPETITION>(shared.y(ring.stage, 0), row, p.neurons,
                                                         p.scale, d.winner);
        shared.statistics[ring.stage][row / 2].row[row % 2] = d.statistics;
        if (kHasWinner) shared.winner[ring.stage][row / 2].row[row % 2] = d.winner;
        barrier_arrive(&shared.known[ring.stage]);
        ring.advance();
      }
    }
  }

  GHL_DEVICE void multiply_and_store(int warpgroup) {
    const int neuron_box = Shape::neuron_box(warpgroup), column_box = Shape::column_box(warpgroup);
    const int warp_neuron = warp % 4 * 16;
    const int32_t neuron = blockIdx.z * p.neurons + first_neuron + neuron_box * kBox + warp_neuron;
    const bool sums_u = p.u_sums && first_box == 0 && column_box == 0;
    float G[64] = {}, H0[64] = {}, u_sums[2] = {};
    uint32_t u[kRows / kDepth][4] = {};
    Ring ring;
    for (int block = 0; block < blocks; ++block) {
      const int stage = ring.stage;
      const uint64_t x = operand(shared_address(shared.x(stage, column_box)));
      const uint64_t g = operand(shared_address(shared.g(stage, neuron_box)));
      barrier_wait(&shared.full[stage], ring.parity);
      products_fence();
      GHL_UNROLL
      for (int row = 0; row < kRows; row += kDepth)
        multiply(G, advanced(g, row), advanced(x, row), T{});
      products_commit();

      products_wait<1>();
      GHL_UNROLL
      for (int i = 0; i < kRows / kDepth; ++i) hold(u[i]);
      if (block > 0) release((stage + kStages - 1) % kStages);
      if (kCompetes) barrier_wait(&shared.known[stage], ring.parity);
      GHL_UNROLL
      for (int i = 0; i < kRows / kDepth; ++i) {
        load_matrices_transposed(
            u[i], shared.y(stage, neuron_box) + fragment_row(lane, i * kDepth, warp_neuron));
        if (kCompetes)
          make_u<T, COMPETITION>(u[i], shared.statistics[stage], shared.winner[stage], lane,
                                 i * kDepth, neuron, p.scale);
      }
      if (sums_u) add_u(u_sums, u);

      products_fence();
      GHL_UNROLL
      for (int i = 0; i < kRows / kDepth; ++i) multiply(H0, u[i], advanced(x, i * kDepth), T{});
      products_commit();
      ring.advance();
    }
    products_wait<0>();
    hold(G);
    hold(H0);
    GHL_UNROLL
    for (int i = 0; i < kRows / kDepth; ++i) hold(u[i]);
    store(p.G, G, neuron_box, column_box);
    store(p.H0, H0, neuron_box, column_box);
    if (sums_u) store_u(u_sums, neuron_box);
  }

  // This warp reads the stage no more. Each warp says so of itself: a wait for products, too, is a
  // warp's own.
  GHL_DEVICE void release(int stage) {
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.empty[stage]);
  }

  GHL_DEVICE static void add_u(float (&sums)[2], const uint32_t (&u)[kRows / kDepth][4]) {
    GHL_UNROLL
    for (int i = 0; i < kRows / kDepth * 4; ++i) {
      const float2 both = unpack(u[i / 4][i % 4], T{});
      sums[i % 2] += both.x + both.y;
    }
  }

  GHL_DEVICE int64_t first_of_split() const {
    return int64_t(blockIdx.y) * p.groups * p.neurons + int64_t(blockIdx.z) * p.neurons;
  }

  GHL_DEVICE void store(float* to, const float (&sums)[64], int neuron_box, int column_box) {
    // neighbouring columns lie side by side in the weight, and at multiples of 8 bytes
    if (channel_step(p, a.geometry.taps) == 1 && p.channels % 2 == 0)
      store_sums<true>(to, sums, neuron_box, column_box);
    else
      store_sums<false>(to, sums, neuron_box, column_box);
  }

  template <bool PAIRS>
  GHL_DEVICE void store_sums(float* to, const float (&sums)[64], int neuron_box, int column_box) {
    const int32_t taps = a.geometry.taps, step = PAIRS ? 1 : channel_step(p, taps);
    GHL_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int number = first_box + column_box + half;
      if (number >= a.geometry.column_boxes) break;
      const ColumnBox box = a.geometry.box(number);
      GHL_UNROLL
      for (int upper = 0; upper < 2; ++upper) {
        const int32_t neuron = first_neuron + neuron_box * kBox + neuron_of_sum(thread, 2 * upper);
        if (neuron >= p.neurons) continue;
        float* row = to + (first_of_split() + neuron) * (int64_t(taps) * p.channels) +
                     weight_column(p, taps, box);
        GHL_UNROLL
        for (int i = 0; i < 8; ++i) {
          const int sum = half * 32 + i * 4 + upper * 2, c = column_of_sum(thread, i * 4);
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

  // Four lanes share a neuron, each with other rows.
  GHL_DEVICE void store_u(const float (&sums)[2], int neuron_box) {
    GHL_UNROLL
    for (int upper = 0; upper < 2; ++upper) {
      float sum = sums[upper] + shuffle_xor(sums[upper], 1);
      sum += shuffle_xor(sum, 2);
      const int32_t neuron = first_neuron + neuron_box * kBox + neuron_of_sum(thread, 2 * upper);
      if (lane % 4 == 0 && neuron < p.neurons) p.u_sums[first_of_split() + neuron] = sum;
    }
  }
};

template <class T, class Shape, Competition COMPETITION>
GHL_KERNEL void GHL_LAUNCH_BOUNDS(kThreads, 1)
    dual_wgrad_kernel(GHL_CONSTANT_ARGUMENT DualWgradArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  auto& shared = *reinterpret_cast<typename Shape::Shared*>(shared_memory());
  DualWgrad<T, Shape, COMPETITION>(arguments, shared).run();
#endif
}

}  // namespace ghl::cuda::sm90
