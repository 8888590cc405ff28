// The statistics of each row of y, or its log-sum-exp.
//
// Cost: reads y (rows × neurons) once, writes 4 to 12 bytes a row; about eight operations and one
// exponential a number, half of what Hopper issues while it reads 16-bit numbers from memory.
// For: rows of any length and strides. Rows whose numbers lie side by side are read 16 bytes at a
// time, kLoads of them under way in each thread: at the 1024 threads that the registers allow, 64
// KB an SM. As many threads share a row as keep kLoads busy: two for 64 neurons in 16 bits, 32, or
// for long rows the block. Where instead the rows lie side by side (NCHW), a warp reads 32 of them
// and the block's warps share the neurons. Threads keep a running maximum and sum.
#pragma once

#include <type_traits>

#include "chunk.h"
#include "competition.h"
#include "division.h"
#include "params.h"
#include "reduce.h"

namespace ghl::cuda {

constexpr int kStatisticsThreads = 256;
constexpr int kLoads = 4;

struct StatisticsArguments {
  StatisticsParams p;
  bool wide;             // chunks of 16 bytes
  bool side;             // rows lie side by side: a warp has a row in each lane
  int32_t log2_members;  // of the number of threads of a row
  Division inner;        // of a row by the inner rows of y

  GHL_HOST_DEVICE int members() const { return 1 << log2_members; }
  GHL_HOST_DEVICE int rows_of_block(int threads) const {
    return side ? kWarp : threads >> log2_members;
  }
};

// What a thread, or a whole row, knows so far. `total` is relative to the largest number; for
// `hard` it is 0, or NaN as soon as one number is.
struct Running {
  float largest = -INFINITY, total = 0.0f;
  int32_t winner = INT32_MAX;
};

// A sum relative to `from` as one relative to `to`; no terms yet stay none.
GHL_DEVICE float rescaled(float total, float from, float to, float scale) {
  const float factor = exp2_approximate((finite_or_zero(from) - finite_or_zero(to)) * scale);
  return total == 0.0f ? 0.0f : total * factor;
}

// What the threads of a row know together. `reduce` gives all of them one value of theirs.
template <Competition COMPETITION, class Reduce>
GHL_DEVICE Running joined(const Running& own, float scale, Reduce reduce) {
  const auto sum = [](float a, float b) { return a + b; };
  Running all;
  all.largest = reduce(own.largest, [](float a, float b) { return fmaxf(a, b); });
  if (COMPETITION == Competition::hard)
    all.total = reduce(own.total, sum);
  else
    all.total = reduce(rescaled(own.total, own.largest, all.largest, scale), sum);
  if (COMPETITION != Competition::softmax)
    all.winner = reduce(own.largest == all.largest ? own.winner : INT32_MAX,
                        [](int32_t a, int32_t b) { return min(a, b); });
  return all;
}

// Adds y[j][i], the row's number (first + j * step) * N + i; -inf where there is none.
template <Competition COMPETITION, int LOADS, int N>
GHL_DEVICE void add(Running& running, const float (&y)[LOADS][N], int first, int step,
                    float scale) {
  float largest = running.largest;
  GHL_UNROLL
  for (int j = 0; j < LOADS; ++j) {
    GHL_UNROLL
    for (int i = 0; i < N; ++i) {
      if (COMPETITION == Competition::softmax) {
        largest = fmaxf(largest, y[j][i]);
      } else if (y[j][i] > largest) {
        largest = y[j][i];
        running.winner = (first + j * step) * N + i;
      }
    }
  }
  if (COMPETITION != Competition::hard)
    running.total = rescaled(running.total, running.largest, largest, scale);
  running.largest = largest;
  const float base = finite_or_zero(largest);
  GHL_UNROLL
  for (int j = 0; j < LOADS; ++j) {
    float part = 0.0f;
    GHL_UNROLL
    for (int i = 0; i < N; ++i) {
      if (COMPETITION == Competition::hard)
        part += y[j][i] == y[j][i] ? 0.0f : y[j][i];
      else
        part += exp2_approximate((y[j][i] - base) * scale);
    }
    running.total += part;
  }
}

// Every `step`th number of a row from `first` on, read one by one.
template <class T, Competition COMPETITION>
GHL_DEVICE void add_numbers(Running& running, const T* row, int64_t stride, int first, int step,
                            int count, float scale) {
  constexpr int loads = 2 * kLoads;
  for (; first < count; first += loads * step) {
    T read[loads];
    GHL_UNROLL
    for (int j = 0; j < loads; ++j) {
      const int at = first + j * step;
      read[j] = at < count ? row[at * stride] : from_float<T>(-INFINITY);
    }
    float y[loads][1];
    GHL_UNROLL
    for (int j = 0; j < loads; ++j) y[j][0] = to_float(read[j]);
    add<COMPETITION>(running, y, first, step, scale);
  }
}

// The same in chunks of 16 bytes; `count`, `first` and `step` are in chunks.
template <class T, Competition COMPETITION>
GHL_DEVICE void add_chunks(Running& running, const T* row, int first, int step, int count,
                           float scale) {
  constexpr int numbers = 16 / sizeof(T);
  uint32_t none = float_to_bits(-INFINITY);
  if constexpr (sizeof(T) == 2) none = pack(-INFINITY, -INFINITY, T{});
  for (; first < count; first += kLoads * step) {
    uint4 read[kLoads];
    GHL_UNROLL
    for (int j = 0; j < kLoads; ++j) {
      const int at = first + j * step;
      read[j] = at < count ? chunk_at(row + int64_t(at) * numbers) : uint4{none, none, none, none};
    }
    float y[kLoads][numbers];
    GHL_UNROLL
    for (int j = 0; j < kLoads; ++j) unpack_chunk(y[j], read[j], T{});
    add<COMPETITION>(running, y, first, step, scale);
  }
}

template <Competition COMPETITION>
GHL_DEVICE void store_statistics(const StatisticsParams& p, int64_t row, const Running& running) {
  const float largest = running.largest;
  if (p.lse) {
    p.lse[row] = (finite_or_zero(largest) * p.scale + log2f(running.total)) * 0.6931471805599453f;
    return;
  }
  const float total = COMPETITION == Competition::hard ? 1.0f + running.total : running.total;
  p.statistics.largest[row] = largest;
  p.statistics.inverse[row] = inverse_of(total, largest, COMPETITION);
  // no number above -inf: the first of them
  if (COMPETITION != Competition::softmax)
    p.statistics.winner[row] = running.winner == INT32_MAX ? 0 : running.winner;
}

template <class T, Competition COMPETITION, bool WIDE>
GHL_KERNEL void GHL_LAUNCH_BOUNDS(kStatisticsThreads, 4)
    statistics_kernel(const StatisticsArguments a) {
  const StatisticsParams& p = a.p;
  const int thread = threadIdx.x, members = a.members();
  const int member = a.side ? thread / kWarp : thread & (members - 1);
  const int row_here = a.side ? thread % kWarp : thread >> a.log2_members;
  const int64_t row = int64_t(blockIdx.x) * a.rows_of_block(blockDim.x) + row_here;
  const bool live = row < p.rows;

  Running running;
  if (live) {
    const uint32_t outer = a.inner.of(uint32_t(row)), inner = uint32_t(row) - outer * p.inner;
    const T* y = static_cast<const T*>(p.y.data) + outer * p.y.row + inner * p.inner_stride;
    int begin = 0;
    if constexpr (WIDE) {
      const int chunks = p.neurons / int(16 / sizeof(T));
      add_chunks<T, COMPETITION>(running, y, member, members, chunks, p.scale);
      begin = chunks * int(16 / sizeof(T));
    }
    add_numbers<T, COMPETITION>(running, y, p.y.column, begin + member, members, p.neurons,
                                p.scale);
  }
  const auto over_lanes = [&](auto value, auto combine) {
    return reduce_lanes(value, min(members, kWarp), combine);
  };
  const auto over_warps = [&](auto value, auto combine) {
    return reduce_warps(value, a.side ? kWarp : 1, combine);
  };
  if (!a.side) running = joined<COMPETITION>(running, p.scale, over_lanes);
  if (a.side || members > kWarp) running = joined<COMPETITION>(running, p.scale, over_warps);
  if (live && member == 0) store_statistics<COMPETITION>(p, row, running);
}

// How the threads of a block share the rows.
inline StatisticsArguments statistics_arguments(const StatisticsParams& p, int threads) {
  const int size = p.dtype == Dtype::float32 ? 4 : 2, numbers = 16 / size;
  const bool inside = p.inner > 1;
  StatisticsArguments a{p, false, false, 0, Division::by(p.inner)};
  a.wide = p.y.column == 1 && p.neurons >= numbers &&
           reinterpret_cast<uintptr_t>(p.y.data) % 16 == 0 && p.y.row % numbers == 0 &&
           (!inside || p.inner_stride % numbers == 0);
  a.side = !a.wide && p.y.column != 1 && (inside ? p.inner_stride : p.y.row) == 1;
  const int loads = a.wide ? p.neurons / numbers : p.neurons;
  const int at_once = a.wide ? kLoads : 2 * kLoads;
  int members = 1;
  while (members < kWarp && members * at_once < loads) members *= 2;
  if (loads > 2 * kWarp * at_once) members = threads;
  if (a.side) members = threads / kWarp;
  while (a.members() < members) ++a.log2_members;
  return a;
}

inline int64_t statistics_blocks(const StatisticsArguments& a, int threads) {
  const int rows_here = a.rows_of_block(threads);
  return (int64_t(a.p.rows) + rows_here - 1) / rows_here;
}

inline int32_t statistics_shared_bytes(const StatisticsArguments& a, int threads) {
  return (a.side ? threads : threads / kWarp) * sizeof(float);
}

// f(T, wide, competition) of types that say which kernel runs; `none` for a linear competition.
template <class Result, class F>
Result with_statistics_kernel(const StatisticsArguments& a, Result none, F&& f) {
  const auto of_width = [&](auto type, auto competition) {
    return a.wide ? f(type, std::true_type{}, competition)
                  : f(type, std::false_type{}, competition);
  };
  const auto of_type = [&](auto competition) {
    if (a.p.dtype == Dtype::float32) return of_width(float{}, competition);
    if (a.p.dtype == Dtype::float16) return of_width(float16{}, competition);
    return of_width(bfloat16{}, competition);
  };
  switch (a.p.competition) {
    case Competition::softmax:
      return of_type(std::integral_constant<Competition, Competition::softmax>{});
    case Competition::hard:
      return of_type(std::integral_constant<Competition, Competition::hard>{});
    case Competition::softhebb:
      return of_type(std::integral_constant<Competition, Competition::softhebb>{});
    default: return none;
  }
}

}  // namespace ghl::cuda
