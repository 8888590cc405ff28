// The sum of split-K's parts of G, H0 and the sums of u, in a fixed order.
//
// Cost: reads splits × (2·K·C + K) float32 numbers, which at one wave of weight-gradient blocks lie
// in L2, and writes 2·K·C + K; one addition a number read. Each thread has kParts loads of 16 bytes
// under way, 128 KB an SM at 1024 threads.
//
// For: many weights and few splits, where a thread adds all parts of its four numbers, and few
// weights and many splits (early layers), where the splits are shared out among groups of threads:
// each group adds a run of them, and the runs are added in their order.
#pragma once

#include <algorithm>

#include "chunk.h"
#include "params.h"

namespace ghl::cuda {

constexpr int kSumThreads = 256;
constexpr int kParts = 8;  // of one number that a thread has under way
constexpr int kMostGroups = 8;

struct SumSplitsArguments {
  SumSplitsParams p;
  int32_t groups;  // of threads, that share out the splits; a power of two
};

template <int WIDTH>
GHL_DEVICE void load_part(float (&numbers)[WIDTH], const float* part) {
  if constexpr (WIDTH == 4)
    load_chunk(numbers, part);
  else
    numbers[0] = *part;
}

// The sum of the parts of numbers at..at + WIDTH - 1 from split `first` up to `last`, in order.
template <int WIDTH>
GHL_DEVICE void add_parts(float (&sum)[WIDTH], const float* parts, int64_t count, int64_t at,
                          int first, int last) {
  for (; first < last; first += kParts) {
    float part[kParts][WIDTH] = {};
    GHL_UNROLL
    for (int j = 0; j < kParts; ++j)
      if (first + j < last) load_part(part[j], parts + (first + j) * count + at);
    GHL_UNROLL
    for (int j = 0; j < kParts; ++j) {
      GHL_UNROLL
      for (int i = 0; i < WIDTH; ++i) sum[i] += part[j][i];
    }
  }
}

// One block's numbers of one result.
template <int WIDTH>
GHL_DEVICE void sum_splits(const float* parts, float* result, int64_t count, int splits,
                           int groups) {
  const int members = blockDim.x / groups, group = threadIdx.x / members;
  const int64_t at = (int64_t(blockIdx.x) * members + threadIdx.x % members) * WIDTH;
  const int each = (splits + groups - 1) / groups;
  const int first = group * each, last = min(first + each, splits);
  float sum[WIDTH] = {};
  if (at < count) add_parts(sum, parts, count, at, first, last);

  float* shared = reinterpret_cast<float*>(shared_memory());
  if (group > 0) {
    for (int i = 0; i < WIDTH; ++i) shared[threadIdx.x * WIDTH + i] = sum[i];
  }
  __syncthreads();
  if (group > 0 || at >= count) return;
  for (int other = 1; other < groups; ++other) {
    for (int i = 0; i < WIDTH; ++i) sum[i] += shared[(other * members + threadIdx.x) * WIDTH + i];
  }
  if constexpr (WIDTH == 4)
    store_chunk(result + at, sum);
  else
    result[at] = sum[0];
}

GHL_HOST_DEVICE bool in_fours(const void* parts, const void* result, int64_t count) {
  const auto address = reinterpret_cast<uintptr_t>(parts) | reinterpret_cast<uintptr_t>(result);
  return address % 16 == 0 && count % 4 == 0;
}

GHL_KERNEL void GHL_LAUNCH_BOUNDS(kSumThreads, 4) sum_splits_kernel(const SumSplitsArguments a) {
  const int which = blockIdx.y;
  const float* parts = which == 0 ? a.p.G_parts : which == 1 ? a.p.H0_parts : a.p.u_parts;
  float* result = which == 0 ? a.p.G : which == 1 ? a.p.H0 : a.p.u_sums;
  const int64_t count = which == 2 ? a.p.neurons : a.p.weights;
  if (in_fours(parts, result, count))
    sum_splits<4>(parts, result, count, a.p.splits, a.groups);
  else
    sum_splits<1>(parts, result, count, a.p.splits, a.groups);
}

inline SumSplitsArguments sum_splits_arguments(const SumSplitsParams& p) {
  SumSplitsArguments a{p, 1};
  while (a.groups < kMostGroups && a.groups * kParts < p.splits) a.groups *= 2;
  return a;
}

// Blocks for the numbers, and results.
inline dim3 sum_splits_grid(const SumSplitsArguments& a, int threads) {
  const auto blocks = [&](const float* parts, const float* result, int64_t count) {
    const int64_t numbers = threads / a.groups * (in_fours(parts, result, count) ? 4 : 1);
    return (count + numbers - 1) / numbers;
  };
  int64_t most =
      std::max(blocks(a.p.G_parts, a.p.G, a.p.weights), blocks(a.p.H0_parts, a.p.H0, a.p.weights));
  if (a.p.u_parts) most = std::max(most, blocks(a.p.u_parts, a.p.u_sums, a.p.neurons));
  return {unsigned(most), a.p.u_parts ? 3u : 2u, 1};
}

constexpr int32_t sum_splits_shared_bytes(int threads) {
  return threads * 4 * sizeof(float);
}

}  // namespace ghl::cuda
