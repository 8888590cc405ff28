// The merge of all layers of a model in one cooperative launch, of one layer in two launches: from
// G, H0 and totals to the updates and statistics.
//
// Cost: reads G, H0 and w (10 bytes a weight with a 16-bit w) twice and writes the update; about
// 60 operations a weight. What the first pass reads of a neuron for s, it reads again from L1 or L2
// for H; the second pass runs backwards, so that it begins with what the first has left in L2.
// Bytes under way at the 768 threads an SM that the registers allow, with a 16-bit w: 74 KB of H0
// and w for s, 61 KB of all three after.
//
// One layer alone spares the grid its waits: each block of the second launch finds max|H| of all
// neurons for itself. Of many, one block does for each layer, and leaves it in the place of the
// first neuron's.
//
// For: any number of layers, of any sizes and dtypes together. A neuron is measured by a warp, or a
// block where it has many weights, never by more: its sums do not depend on the size of the grid,
// and no sum on the order in which blocks run. Tasks of all layers are numbered on and dealt out in
// turn, so that a large layer meets the whole GPU, and many small ones do as well.
#pragma once

#include <algorithm>

#include "any_dtype.h"
#include "reduce.h"

namespace ghl::cuda {

constexpr int kMergeThreads = 256;
constexpr int kLongRow = 1024;       // more weights of a neuron than this: a block measures it
constexpr int kUnroll = 2;           // loads of one tensor that a thread has under way
constexpr int kNumbersOfThread = 8;  // of a task in the second pass

// The layers, in the kernel's arguments: nothing is copied to the GPU beforehand, and a CUDA graph
// keeps them.
template <int CAPACITY>
struct MergeTable {
  Decay decay;
  Gate gate;
  Normalize normalize;
  int32_t count;
  MergeLayer layers[CAPACITY];
};

template <int CAPACITY>
MergeTable<CAPACITY> table_of(const MergeLayer* layers, int32_t count, Decay decay, Gate gate,
                              Normalize normalize) {
  MergeTable<CAPACITY> table;
  table.decay = decay, table.gate = gate, table.normalize = normalize, table.count = count;
  std::copy(layers, layers + count, table.layers);
  return table;
}

// work(layer, task) of this block's share of the tasks of all layers, of which tasks_of(layer)
// tells how many there are; backwards, the last is the first.
template <class Table, class TasksOf, class Work>
GHL_DEVICE void deal_out(const Table& table, bool backwards, TasksOf tasks_of, Work work) {
  int32_t task = blockIdx.x, before = 0;
  for (int32_t i = 0; i < table.count; ++i) {
    const MergeLayer& layer = table.layers[backwards ? table.count - 1 - i : i];
    const int32_t tasks = tasks_of(layer);
    for (; task < before + tasks; task += gridDim.x)
      work(layer, backwards ? before + tasks - 1 - task : task - before);
    before += tasks;
  }
}

GHL_HOST_DEVICE int32_t measure_tasks(const MergeLayer& layer, int threads) {
  const int neurons = layer.columns > kLongRow ? 1 : threads / kWarp;
  return (layer.out_channels + neurons - 1) / neurons;
}

GHL_HOST_DEVICE int32_t combine_tasks(const MergeLayer& layer, int threads) {
  const int64_t numbers = int64_t(threads) * kNumbersOfThread;
  return int32_t((layer.out_channels * layer.columns + numbers - 1) / numbers);
}

// The larger number; NaN if one is.
GHL_DEVICE float larger(float a, float b) {
  return b > a || b != b ? b : a;
}

struct Measures {
  float GH = 0.0f, GG = 0.0f, HH = 0.0f, largest = 0.0f;
};

GHL_DEVICE Measures joined(const Measures& a, const Measures& b) {
  return {a.GH + b.GH, a.GG + b.GG, a.HH + b.HH, larger(a.largest, b.largest)};
}

// H = H0 - s w, the same in both passes to the last bit.
GHL_DEVICE float decayed(float H0, float w, float s, Decay decay) {
  return decay == Decay::none ? H0 : fmaf(-s, w, H0);
}

// This thread's part of <H0, w> of the neuron whose weights begin at `start`.
template <int WIDTH>
GHL_DEVICE float inner_product(const MergeLayer& layer, int64_t start, int member, int members) {
  const int step = members * WIDTH, columns = int(layer.columns);
  constexpr int unroll = 2 * kUnroll;  // of two tensors, not three
  float sum = 0.0f;
  for (int first = member * WIDTH; first < columns; first += unroll * step) {
    Raw<WIDTH> H0[unroll] = {}, w[unroll] = {};
    GHL_UNROLL
    for (int j = 0; j < unroll; ++j) {
      if (first + j * step < columns) {
        H0[j] = load_raw<WIDTH>(layer.H0, layer.H0_dtype, start + first + j * step);
        w[j] = load_raw<WIDTH>(layer.w, layer.w_dtype, start + first + j * step);
      }
    }
    GHL_UNROLL
    for (int j = 0; j < unroll; ++j) {
      float h[WIDTH], weight[WIDTH];
      to_floats(h, H0[j], layer.H0_dtype);
      to_floats(weight, w[j], layer.w_dtype);
      GHL_UNROLL
      for (int i = 0; i < WIDTH; ++i) sum = fmaf(h[i], weight[i], sum);
    }
  }
  return sum;
}

// This thread's part of what is measured of the neuron.
template <int WIDTH>
GHL_DEVICE Measures measures(const MergeLayer& layer, int64_t start, float s, Decay decay,
                             int member, int members) {
  const int step = members * WIDTH, columns = int(layer.columns);
  Measures sums;
  for (int first = member * WIDTH; first < columns; first += kUnroll * step) {
    Raw<WIDTH> G[kUnroll] = {}, H0[kUnroll] = {}, w[kUnroll] = {};
    GHL_UNROLL
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * step < columns) {
        const int64_t at = start + first + j * step;
        G[j] = load_raw<WIDTH>(layer.G, layer.G_dtype, at);
        H0[j] = load_raw<WIDTH>(layer.H0, layer.H0_dtype, at);
        if (decay != Decay::none) w[j] = load_raw<WIDTH>(layer.w, layer.w_dtype, at);
      }
    }
    GHL_UNROLL
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * step >= columns) break;  // an infinite s times no weight were NaN
      float gradient[WIDTH], h[WIDTH], weight[WIDTH];
      to_floats(gradient, G[j], layer.G_dtype);
      to_floats(h, H0[j], layer.H0_dtype);
      to_floats(weight, w[j], layer.w_dtype);
      GHL_UNROLL
      for (int i = 0; i < WIDTH; ++i) {
        const float H = decayed(h[i], weight[i], s, decay);
        sums.GH = fmaf(gradient[i], H, sums.GH);
        sums.GG = fmaf(gradient[i], gradient[i], sums.GG);
        sums.HH = fmaf(H, H, sums.HH);
        sums.largest = larger(sums.largest, fabsf(H));
      }
    }
  }
  return sums;
}

// Fills a neuron's scratch, s and max|H|, and its statistics: by the whole warp, or the whole block
// if `whole_block`.
template <int WIDTH>
GHL_DEVICE void measure(const MergeLayer& layer, int32_t neuron, Decay decay, bool whole_block) {
  const int member = whole_block ? threadIdx.x : threadIdx.x % kWarp;
  const int members = whole_block ? blockDim.x : kWarp;
  const auto reduce = [&](auto value, auto combine) {
    return whole_block ? reduce_block(value, combine) : reduce_lanes(value, kWarp, combine);
  };
  const int64_t start = neuron * layer.columns;
  float s = 0.0f;
  if (decay == Decay::oja)
    s = reduce(inner_product<WIDTH>(layer, start, member, members),
               [](float a, float b) { return a + b; });
  if (decay == Decay::instar) s = number_at(layer.totals, layer.totals_dtype, neuron);
  const Measures all = reduce(measures<WIDTH>(layer, start, s, decay, member, members),
                              [](const Measures& a, const Measures& b) { return joined(a, b); });
  if (member == 0) {
    const int64_t K = layer.out_channels;
    layer.scratch[neuron] = s, layer.scratch[K + neuron] = all.largest;
    layer.neurons[neuron] = all.GH, layer.neurons[K + neuron] = all.GG;
    layer.neurons[2 * K + neuron] = all.HH;
  }
}

GHL_DEVICE void measure_task(const MergeLayer& layer, int32_t task, Decay decay) {
  const bool whole_block = layer.columns > kLongRow;
  const int32_t neuron =
      whole_block ? task : task * int(blockDim.x / kWarp) + int(threadIdx.x / kWarp);
  if (neuron >= layer.out_channels) return;  // all threads of a warp alike
  const bool wide = layer.columns % 4 == 0 && is_wide(layer.G, layer.G_dtype) &&
                    is_wide(layer.H0, layer.H0_dtype) && is_wide(layer.w, layer.w_dtype);
  if (wide)
    measure<4>(layer, neuron, decay, whole_block);
  else
    measure<1>(layer, neuron, decay, whole_block);
}

// Writes the statistics of a layer, and returns its max|H|; by a whole block.
GHL_DEVICE float summarize(const MergeLayer& layer) {
  const int64_t K = layer.out_channels;
  Measures sums;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
    sums = joined(sums, {layer.neurons[k], layer.neurons[K + k], layer.neurons[2 * K + k],
                         layer.scratch[K + k]});
  sums = reduce_block(sums, [](const Measures& a, const Measures& b) { return joined(a, b); });
  if (threadIdx.x == 0)
    layer.layer[0] = sums.GH, layer.layer[1] = sums.GG, layer.layer[2] = sums.HH;
  return sums.largest;
}

// max|H| of a layer alone; by a whole block.
GHL_DEVICE float largest_of(const MergeLayer& layer) {
  const int64_t K = layer.out_channels;
  float largest = 0.0f;
  for (int64_t k = threadIdx.x; k < K; k += blockDim.x)
    largest = larger(largest, layer.scratch[K + k]);
  return reduce_block(largest, [](float a, float b) { return larger(a, b); });
}

// Where the block, which is alone with one layer, has its max|H|: a register less than a variable.
GHL_DEVICE float& largest_of_block() {
  return *reinterpret_cast<float*>(shared_memory());
}

template <bool ALONE>
GHL_DEVICE float divisor_of(const MergeLayer& layer, Normalize normalize) {
  if (normalize == Normalize::absmax)
    return (ALONE ? largest_of_block() : layer.scratch[layer.out_channels]) + 1e-30f;
  if (normalize == Normalize::none) return 1.0f;
  const float rows = number_at(layer.totals, layer.totals_dtype, layer.out_channels);
  return rows < 1.0f ? 1.0f : rows;
}

// What the optimizer is given for one weight; H is divided already. sign(NaN) is NaN.
GHL_DEVICE float gated(float G, float H, Gate gate) {
  const float sign = G > 0.0f ? 1.0f : G < 0.0f ? -1.0f : G;
  if (gate == Gate::gradient) return G;
  if (gate == Gate::sign_only) return sign;
  return gate == Gate::hebb ? -H : sign * fabsf(H);
}

// The update of the layer's weights from `begin` up to `end`, fewer than 2^31; by a whole block.
template <int WIDTH, bool ALONE>
GHL_DEVICE void combine(const MergeLayer& layer, int64_t begin, int64_t end, Decay decay, Gate gate,
                        Normalize normalize) {
  const bool needs_H = gate == Gate::sign || gate == Gate::hebb;
  const int count = int(end - begin), step = int(blockDim.x) * WIDTH;
  const int64_t first_neuron = begin / layer.columns;
  const uint32_t first_column = uint32_t(begin - first_neuron * layer.columns);
  const uint32_t columns = uint32_t(layer.columns);
  for (int first = int(threadIdx.x) * WIDTH; first < count; first += kUnroll * step) {
    Raw<WIDTH> G[kUnroll] = {}, H0[kUnroll] = {}, w[kUnroll] = {};
    GHL_UNROLL
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * step < count) {
        const int64_t at = begin + first + j * step;
        G[j] = load_raw<WIDTH>(layer.G, layer.G_dtype, at);
        if (needs_H) H0[j] = load_raw<WIDTH>(layer.H0, layer.H0_dtype, at);
        if (needs_H && decay != Decay::none) w[j] = load_raw<WIDTH>(layer.w, layer.w_dtype, at);
      }
    }
    GHL_UNROLL
    for (int j = 0; j < kUnroll; ++j) {
      if (first + j * step >= count) break;
      float gradient[WIDTH], h[WIDTH], weight[WIDTH];
      to_floats(gradient, G[j], layer.G_dtype);
      if (needs_H) {
        to_floats(h, H0[j], layer.H0_dtype);
        to_floats(weight, w[j], layer.w_dtype);
        const float divisor = divisor_of<ALONE>(layer, normalize);
        const uint32_t column = first_column + first + j * step;
        const float* decays = layer.scratch + first_neuron + column / columns;
        float s = *decays;
        uint32_t left = columns - column % columns;  // weights of this neuron from here on
        GHL_UNROLL
        for (int i = 0; i < WIDTH; ++i, --left) {
          if (left == 0) s = *++decays, left = columns;
          h[i] = decayed(h[i], weight[i], s, decay);
          if (normalize != Normalize::none) h[i] /= divisor;  // rounded to nearest
        }
      }
      GHL_UNROLL
      for (int i = 0; i < WIDTH; ++i) gradient[i] = gated(gradient[i], needs_H ? h[i] : 0.0f, gate);
      store_floats(layer.update, layer.update_dtype, begin + first + j * step, gradient);
    }
  }
}

template <bool ALONE>
GHL_DEVICE void combine_task(const MergeLayer& layer, int32_t task, Decay decay, Gate gate,
                             Normalize normalize) {
  const int64_t numbers = int64_t(blockDim.x) * kNumbersOfThread, begin = task * numbers;
  const int64_t end = min(begin + numbers, layer.out_channels * layer.columns);
  const bool wide = is_wide(layer.G, layer.G_dtype) && is_wide(layer.H0, layer.H0_dtype) &&
                    is_wide(layer.w, layer.w_dtype) && is_wide(layer.update, layer.update_dtype);
  const int64_t fours = wide ? begin + (end - begin) / 4 * 4 : begin;
  if (begin < fours) combine<4, ALONE>(layer, begin, fours, decay, gate, normalize);
  if (fours < end) combine<1, ALONE>(layer, fours, end, decay, gate, normalize);
}

template <class Table>
GHL_DEVICE void measure_all(const Table& table) {
  const int threads = blockDim.x;
  deal_out(
      table, false, [&](const MergeLayer& layer) { return measure_tasks(layer, threads); },
      [&](const MergeLayer& layer, int32_t task) { measure_task(layer, task, table.decay); });
}

template <bool ALONE, class Table>
GHL_DEVICE void combine_all(const Table& table) {
  const int threads = blockDim.x;
  deal_out(
      table, true, [&](const MergeLayer& layer) { return combine_tasks(layer, threads); },
      [&](const MergeLayer& layer, int32_t task) {
        combine_task<ALONE>(layer, task, table.decay, table.gate, table.normalize);
      });
}

template <int CAPACITY>
GHL_KERNEL void GHL_LAUNCH_BOUNDS(kMergeThreads, 3)
    merge_kernel(GHL_CONSTANT_ARGUMENT MergeTable<CAPACITY> table) {
  measure_all(table);
  synchronize_grid();
  for (int32_t i = blockIdx.x; i < table.count; i += gridDim.x) {
    const MergeLayer& layer = table.layers[i];
    const float largest = summarize(layer);
    if (threadIdx.x == 0 && layer.out_channels > 0) layer.scratch[layer.out_channels] = largest;
  }
  synchronize_grid();
  combine_all<false>(table);
}

// The two launches of one layer alone.
GHL_KERNEL void GHL_LAUNCH_BOUNDS(kMergeThreads, 3)
    measure_kernel(GHL_CONSTANT_ARGUMENT MergeTable<1> table) {
  measure_all(table);
}

GHL_KERNEL void GHL_LAUNCH_BOUNDS(kMergeThreads, 3)
    combine_kernel(GHL_CONSTANT_ARGUMENT MergeTable<1> table) {
  const MergeLayer& layer = table.layers[0];
  const float largest = blockIdx.x == 0 ? summarize(layer) : largest_of(layer);
  __syncthreads();  // the reduction's shared memory has been read
  if (threadIdx.x == 0) largest_of_block() = largest;
  __syncthreads();
  combine_all<true>(table);
}

constexpr int32_t merge_shared_bytes(int threads) {
  return threads / kWarp * sizeof(Measures);
}

}  // namespace ghl::cuda
