// u that the blocks of threads of a part make together and hand to each other through L2: each row
// once, instead of once for every tile or by a kernel that stores all of it first.
//
// The blocks of a part (sm90_schedule.h) go through the same rows, a chunk after another. Their
// warps that make u share out the rows of a chunk, write them into a ring in global memory, small
// enough to stay in L2, and each block counts itself as done; from there the copy engine takes
// boxes of u as it does of a stored one. y is read once, and u is never all there.
//
// A block begins chunk c when it has itself been given all of chunk c - kAhead. That is enough for
// nobody to overwrite what others still read: chunk c - kAhead was whole then, so every block had
// written its rows of it, and had been given all of chunk c - 2 · kAhead before, which is the chunk
// that lay in c's place. Nor does a count of one chunk mix with that of the next in its place. What
// a block waits for are rows of the same chunk or chunks before: all go on as long as all blocks of
// a part are on the GPU at once, which a cooperative launch sees to.
//
// Cost beside the products: y once, and u written to L2 once; about twelve instructions a number. A
// warp beside products issues one in 4.5 to 6.5 cycles, so that many warps do this, with 2 KB of y
// under way for each.
#pragma once

#include "competition.h"
#include "sm90.h"
#include "sm90_layout.h"
#include "sm90_schedule.h"

namespace ghl::cuda::sm90 {

constexpr int kPlaces = 2 * kAhead;                     // in chunks
constexpr int kChunk = 4, kChunkRows = kChunk * kRows;  // in blocks of rows, in rows
constexpr int kEights = 4;                              // of neurons that a lane has of a row
constexpr int kMostExchanged = kEights * 8 * 32;

struct Exchange {
  uint16_t* u;        // (parts, rows of a ring, neurons)
  int32_t* arrivals;  // (parts, kPlaces): blocks that have written a chunk, of all chunks so far
  int32_t ring_rows;  // kPlaces chunks, or as many as a part has

  // The row, of all rings, that a row of the part lies in.
  GHL_HOST_DEVICE int32_t row(int32_t part, int32_t row_of_part) const {
    return part * ring_rows + row_of_part % (kPlaces * kChunkRows);
  }
  GHL_HOST_DEVICE int32_t* arrivals_of(int32_t part, int32_t chunk) const {
    return arrivals + part * kPlaces + chunk % kPlaces;
  }
  // Until all blocks of a part of so many tiles have written their rows of a chunk.
  GHL_DEVICE void wait_for(int32_t part, int32_t chunk, int32_t tiles) const {
    const int32_t wanted = (chunk / kPlaces + 1) * tiles;
    wait_until([&] { return counted(arrivals_of(part, chunk)) >= wanted; });
  }
};

// The memory of an exchange, and its arrangement.
struct ExchangeLayout {
  int32_t ring_rows;
  int64_t u_bytes, arrivals_bytes;

  ExchangeLayout(int32_t neurons, int64_t parts, int32_t rows_of_part)
      : ring_rows(kChunkRows * min(kPlaces, (rows_of_part + kChunkRows - 1) / kChunkRows)),
        u_bytes(parts * ring_rows * neurons * 2),
        arrivals_bytes(parts * kPlaces * 4) {}

  int64_t bytes() const { return u_bytes + arrivals_bytes; }
  Exchange in(void* memory) const {
    auto* begin = static_cast<char*>(memory);
    return {reinterpret_cast<uint16_t*>(begin), reinterpret_cast<int32_t*>(begin + u_bytes),
            ring_rows};
  }
};

// How a warp shares rows: `lanes` of it, a power of two, have one, each eight neurons kEights
// times, and `lanes` eights from the one to the next.
struct Share {
  int32_t neurons, lanes = 1, rows, row, first;  // rows of the warp, this lane's, its first neuron

  GHL_DEVICE Share(int32_t of, int lane) : neurons(of) {
    while (lanes * 8 * kEights < neurons) lanes *= 2;
    rows = 32 / lanes, row = lane / lanes, first = lane % lanes * 8;
  }
  GHL_DEVICE int32_t neuron(int i) const { return first + 8 * lanes * i; }
  GHL_DEVICE bool has(int i) const { return neuron(i) < neurons; }

  // Over the lanes of a row.
  template <class Combine>
  GHL_DEVICE float reduce(float value, const Combine& combine) const {
    GHL_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      const float other = shuffle_xor(value, mask);
      if (mask < lanes) value = combine(value, other);
    }
    return value;
  }
};

// A lane's neurons of a row of y, to become u.
template <class T>
struct ExchangedRow {
  uint32_t pairs[4 * kEights];
  float powers[8 * kEights];
  float inverse;

  // What a lane has not is another's.
  GHL_DEVICE void load(const uint16_t* row, const Share& share) {
    GHL_UNROLL
    for (int i = 0; i < kEights; ++i) {
      const int neuron = min(share.neuron(i), share.neurons - 8);
      const uint4 eight = load_once(row + neuron);
      pairs[4 * i] = eight.x, pairs[4 * i + 1] = eight.y;
      pairs[4 * i + 2] = eight.z, pairs[4 * i + 3] = eight.w;
    }
  }

  // y becomes powers; what is left of it may be loaded over.
  GHL_DEVICE void raise(float scale, const Share& share) {
    uint32_t most[4] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    GHL_UNROLL
    for (int i = 4; i < 4 * kEights; ++i) most[i % 4] = larger(most[i % 4], pairs[i], T{});
    const float2 two =
        unpack(larger(larger(most[0], most[1], T{}), larger(most[2], most[3], T{}), T{}), T{});
    const float largest =
        share.reduce(fmaxf(two.x, two.y), [](float a, float b) { return fmaxf(a, b); });
    const float top = finite_or_zero(largest);
    float sum = 0.0f;
    GHL_UNROLL
    for (int i = 0; i < kEights; ++i) {
      float sums[2] = {0.0f, 0.0f};
      GHL_UNROLL
      for (int j = 4 * i; j < 4 * i + 4; ++j) {
        const float2 y = unpack(pairs[j], T{});
        sums[0] += powers[2 * j] = exp2_approximate((y.x - top) * scale);
        sums[1] += powers[2 * j + 1] = exp2_approximate((y.y - top) * scale);
      }
      sum += share.has(i) ? sums[0] + sums[1] : 0.0f;
    }
    sum = share.reduce(sum, [](float a, float b) { return a + b; });
    inverse = inverse_of(sum, largest, Competition::softmax);
  }

  // Writes u; if the layer has no such row, zeros, unless u is NaN.
  GHL_DEVICE void store(uint16_t* row, bool there, const Share& share) const {
    const float factor = there ? inverse : 0.0f;
    GHL_UNROLL
    for (int i = 0; i < kEights; ++i) {
      uint32_t u[4];
      GHL_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float* both = powers + 8 * i + 2 * j;
        u[j] = pack(both[0] * factor, both[1] * factor, T{});
      }
      if (share.has(i)) store_global(row + share.neuron(i), {u[0], u[1], u[2], u[3]});
    }
  }
};

// A piece's row of y; for one that is not there the last, whose u is NaN only where all sums are.
GHL_DEVICE const uint16_t* row_of_y(const DualWgradParams& p, const Piece& piece, int row) {
  const int64_t at = min(int64_t(piece.first) * kRows + row, int64_t(p.rows - 1));
  return as_it_is(static_cast<const uint16_t*>(p.y.data) + at * p.y.row);
}

// A warp that writes rows of u for all blocks of its part, of `tiles`, as many at a time as its
// lanes share; then come those of all other warps, while its next are on their way. The block's
// WARPS tell of its rows in turn, since that takes as long as a trip to L2.
template <class T, int WARPS, class Shared>
GHL_DEVICE void exchange_rows(const DualWgradParams& p, const Exchange& exchange,
                              const Piece& piece, int32_t tiles, Shared& shared, int turn) {
  const int lane = threadIdx.x % 32;
  const Share share(p.neurons, lane);
  const int step = tiles * WARPS * share.rows;
  int row = (turn * tiles + piece.tile) * share.rows + share.row;
  ExchangedRow<T> numbers;
  numbers.load(row_of_y(p, piece, row), share);
  for (int chunk = 0; chunk * kChunk < piece.blocks; ++chunk) {
    const int slot = chunk % kAhead, parity = chunk / kAhead % 2;
    if (chunk >= kAhead) barrier_wait(&shared.given[slot], parity ^ 1);
    for (; row - share.row < (chunk + 1) * kChunkRows; row += step) {
      numbers.raise(p.scale, share);
      numbers.load(row_of_y(p, piece, row + step), share);
      uint16_t* u = exchange.u + int64_t(exchange.row(piece.part, row)) * p.neurons;
      numbers.store(as_it_is(u), int64_t(piece.first) * kRows + row < p.rows, share);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.written[slot]);
    if (chunk % WARPS != turn) continue;
    barrier_wait(&shared.written[slot], parity);
    global_written();
    if (lane == 0) count_up(exchange.arrivals_of(piece.part, chunk));
  }
}

}  // namespace ghl::cuda::sm90
