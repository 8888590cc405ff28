// G = gᵀx and H0 = uᵀx of a convolution or linear layer in one pass over tiles of rows.
//
// Costs 4 * rows * out_channels * columns FLOPs, reads x, y and g once per split and writes G and
// H0. Nothing of activation size is kept: per thread one staged image, one tile of patches and one
// of each signal. Rows are split over threads while a second copy of the sums is small (their sums
// are then added in a fixed order); otherwise neurons are, and each thread packs all patches.
#pragma once

#include "kernels.h"
#include "microkernel.h"
#include "patches.h"
#include "signals.h"

namespace ghl::cpu {
namespace {

constexpr int64_t kMostSumBytes = 16 << 20;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMostTasks = 256;
constexpr int64_t kStripNeurons = 32 * kMicroNeurons;

// Hands out aligned pieces of one block; with no block it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = block_ ? block_ + used_ : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

// How the work is cut: tasks are row ranges of all neurons, or neuron ranges of all rows.
struct Split {
  int64_t tasks, rows, neurons;  // rows and neurons of one task, the last may have fewer
  bool by_neurons;

  Split(const PairParams& p, int64_t row_size, int64_t element_size, int64_t available) {
    const int64_t threads = minimum(available, kMostTasks);
    const int64_t all_rows = rows_of(p.y), all_neurons = p.y.size[1];
    const int64_t sums = 2 * all_neurons * row_size * element_size;
    const int64_t tiles = divide_up(all_rows, kTileRows);
    by_neurons = (threads - 1) * sums > kMostSumBytes || tiles < 2 * threads;
    const int64_t units = by_neurons ? divide_up(all_neurons, kMicroNeurons) : tiles;
    const int64_t share = divide_up(units, threads > units ? units : threads);
    tasks = divide_up(units, share);
    rows = by_neurons ? all_rows : share * kTileRows;
    neurons = by_neurons ? minimum(share * kMicroNeurons, all_neurons) : all_neurons;
  }
};

template <class T>
RowStatistics<T> take_statistics(Arena& arena, int64_t rows) {
  const int64_t padded = round_up(rows, 16) + 16;
  return {arena.take<T>(padded), arena.take<T>(padded), arena.take<int32_t>(padded)};
}

template <class T>
RowStatistics<T> from_row(RowStatistics<T> s, int64_t row) {
  return {s.maximum + row, s.sum + row, s.winner + row};
}

template <class In, class T>
class PairKernel {
 public:
  PairKernel(const PairParams& p, int64_t threads, void* workspace)
      : p_(p),
        geometry_(PatchGeometry::of(p, static_cast<const In*>(nullptr), static_cast<T*>(nullptr))),
        rows_(rows_of(p.y)),
        neurons_(p.y.size[1]),
        group_neurons_(neurons_ / p.groups),
        split_(p, geometry_.columns, sizeof(T), threads),
        arena_(workspace) {
    const int64_t sums = neurons_ * geometry_.columns;
    for (int64_t task = 0; task < split_.tasks; ++task) {
      Task& t = tasks_[task];
      const bool own_sums = task > 0 && !split_.by_neurons;
      t.G = own_sums ? arena_.take<T>(sums) : static_cast<T*>(p.G);
      t.H0 = own_sums ? arena_.take<T>(sums) : static_cast<T*>(p.H0);
      t.totals = arena_.take<double>(neurons_);
      t.image = arena_.take<T>(
          geometry_.direct ? 0 : geometry_.channels * geometry_.height * geometry_.width);
      t.panels = arena_.take<T>(most_groups() * group_panel_elements<T>(geometry_.columns));
      t.u = arena_.take<T>(signal_tile_elements(neurons_));  // statistics need all neurons
      t.g = arena_.take<T>(signal_tile_elements(split_.neurons));
      t.block = arena_.take<T>(kMicroNeurons * geometry_.columns);
    }
    statistics_ = take_statistics<T>(arena_, split_.by_neurons ? rows_ : split_.tasks * kTileRows);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run(const Threads& threads) {
    if (split_.by_neurons && p_.competition != Competition::linear) {
      const int64_t tiles = divide_up(rows_, kTileRows), share = divide_up(tiles, split_.tasks);
      threads.run(split_.tasks, [&](int64_t task) {
        for (int64_t tile = task * share; tile < minimum((task + 1) * share, tiles); ++tile)
          compute_statistics(task, tile * kTileRows, from_row(statistics_, tile * kTileRows));
      });
    }
    threads.run(split_.tasks, [&](int64_t task) { sum_task(task); });
    threads.run(split_.tasks, [&](int64_t task) { finish(task); });
    static_cast<T*>(p_.totals)[neurons_] = static_cast<T>(rows_);
  }

 private:
  struct Task {
    T *G, *H0;
    double* totals;
    T *image, *panels, *u, *g, *block;
  };

  struct Product {
    const T* signal;
    T* sums;
  };

  int64_t most_groups() const {
    return minimum(p_.groups, divide_up(split_.neurons, group_neurons_) + 1);
  }
  // Leaves y in the task's tile, or with `keep_powers` exp((y - maximum) / tau).
  void compute_statistics(int64_t task, int64_t row0, RowStatistics<T> out,
                          bool keep_powers = false) {
    const int64_t rows = minimum(kTileRows, rows_ - row0);
    T* y = tasks_[task].u;
    gather<In>(p_.y, 0, neurons_, row0, rows, y);
    row_statistics(y, neurons_, rows, inverse<T>(p_.tau), out, keep_powers ? y : nullptr);
    if (p_.competition != Competition::softmax) find_winners(y, neurons_, rows, out);
  }

  void sum_task(int64_t index) {
    const Task& task = tasks_[index];
    const int64_t k0 = split_.by_neurons ? index * split_.neurons : 0;
    const int64_t k1 = minimum(k0 + split_.neurons, neurons_);
    const int64_t row0 = split_.by_neurons ? 0 : index * split_.rows;
    const int64_t row1 = minimum(row0 + split_.rows, rows_);
    const int64_t sums = (k1 - k0) * geometry_.columns;
    if (!geometry_.direct)
      clear(task.image, geometry_.channels * geometry_.height * geometry_.width);
    clear(task.totals + k0, k1 - k0);
    if (row0 >= row1) {  // else the first tile's are the sums' first
      clear(task.G + k0 * geometry_.columns, sums);
      clear(task.H0 + k0 * geometry_.columns, sums);
    }

    Patches<In, T> patches(p_, task.image, task.panels);
    for (int64_t row = row0; row < row1; row += kTileRows)
      sum_tile(index, k0, k1, row, minimum(kTileRows, row1 - row), row > row0, patches);
  }

  template <class E>
  static void clear(E* data, int64_t count) {
    __builtin_memset(data, 0, count * sizeof(E));
  }

  void sum_tile(int64_t index, int64_t k0, int64_t k1, int64_t row0, int64_t rows, bool add,
                Patches<In, T>& patches) {
    const Task& task = tasks_[index];
    RowStatistics<T> statistics =
        from_row(statistics_, split_.by_neurons ? row0 : index * kTileRows);
    const bool whole_rows = !split_.by_neurons && p_.competition == Competition::softmax;
    if (split_.by_neurons || p_.competition == Competition::linear) {
      gather<In>(p_.y, k0, k1, row0, rows, task.u);
    } else {
      compute_statistics(index, row0, statistics, whole_rows);
    }
    if (whole_rows) {
      divide_by_sum(task.u, k1 - k0, rows, statistics);
    } else {
      compete(task.u, k0, k1 - k0, rows, p_.competition, inverse<T>(p_.tau), statistics);
    }
    add_totals(task.u, k1 - k0, rows, task.totals + k0);
    gather<In>(p_.g, k0, k1, row0, rows, task.g);

    const Product products[] = {{task.g, task.G}, {task.u, task.H0}};
    const int64_t group0 = k0 / group_neurons_, group1 = divide_up(k1, group_neurons_);
    patches.pack(row0, rows, group0, group1);
    for_each_strip(k0, k1, [&](int64_t first, int64_t last) {
      const int64_t group = first / group_neurons_ - group0;
      for (int64_t column = 0; column < geometry_.columns; column += kPanel<T>)
        for (const Product& p : products)
          sum_panel(p, k0, first, last, rows, patches.panel(group, column), column, add);
    });
  }

  // Neurons of one group, few enough that a tile of their signals stays in the second cache level.
  template <class F>
  void for_each_strip(int64_t k0, int64_t k1, const F& f) const {
    for (int64_t first = k0; first < k1;) {
      const int64_t group_end = (first / group_neurons_ + 1) * group_neurons_;
      const int64_t last = minimum(minimum(k1, group_end), first + kStripNeurons);
      f(first, last);
      first = last;
    }
  }

  void sum_panel(const Product& p, int64_t k0, int64_t first, int64_t last, int64_t rows,
                 const T* panel, int64_t column, bool add) {
    const int64_t columns = minimum(kPanel<T>, geometry_.columns - column);
    for (int64_t k = first; k < last; k += kMicroNeurons) {
      const int64_t neurons = minimum(kMicroNeurons, last - k);
      T* sums = p.sums + k * geometry_.columns + neurons * column;
      multiply_microtile(rows, p.signal + (k - k0) * kNeuronStride, panel, sums, neurons, columns,
                         add);
    }
  }

  // While they are being summed, a microtile's sums lie panel by panel: (panels, neurons, columns)
  // in the memory of its rows. Adds the tasks' sums in their order and makes rows of them.
  void finish(int64_t index) {
    const int64_t k0 = split_.by_neurons ? index * split_.neurons : 0;
    const int64_t k1 = minimum(k0 + split_.neurons, neurons_);
    int64_t microtile = 0;
    for_each_strip(k0, k1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k += kMicroNeurons, ++microtile)
        if (split_.by_neurons || microtile % split_.tasks == index)
          finish_microtile(k, minimum(kMicroNeurons, last - k), index);
    });
  }

  void finish_microtile(int64_t k0, int64_t neurons, int64_t index) {
    const int64_t first = split_.by_neurons ? index : 0;
    const int64_t last = split_.by_neurons ? index : split_.tasks - 1;
    for (int64_t k = k0; k < k0 + neurons; ++k) {
      double total = 0;
      for (int64_t task = first; task <= last; ++task) total += tasks_[task].totals[k];
      static_cast<T*>(p_.totals)[k] = static_cast<T>(total);
    }
    const int64_t at = k0 * geometry_.columns, count = neurons * geometry_.columns;
    T* block = tasks_[index].block;
    T* Task::* const both[] = {&Task::G, &Task::H0};
    for (T* Task::* sums : both) {
      T* out = tasks_[first].*sums + at;
      __builtin_memcpy(block, out, count * sizeof(T));
      for (int64_t task = first + 1; task <= last; ++task)
        for (int64_t i = 0; i < count; ++i) block[i] += (tasks_[task].*sums)[at + i];
      for (int64_t column = 0; column < geometry_.columns; column += kPanel<T>)
        scatter_panel(block + neurons * column, neurons, column, out);
    }
  }

  // One panel of a microtile to its place in the rows, in the weight's order: all channels of a tap
  // after the other, or all taps of a channel.
  void scatter_panel(const T* panel, int64_t neurons, int64_t column, T* rows) const {
    const int64_t columns = minimum(kPanel<T>, geometry_.columns - column);
    const int64_t taps = p_.channels_last ? 1 : p_.kernel_size[0] * p_.kernel_size[1];
    const int64_t channels = geometry_.columns / taps;
    for (int64_t k = 0; k < neurons; ++k, panel += columns, rows += geometry_.columns) {
      if (taps == 1) {
        __builtin_memcpy(rows + column, panel, columns * sizeof(T));
        continue;
      }
      int64_t to = column % channels * taps + column / channels;
      for (int64_t c = 0; c < columns; ++c) {
        rows[to] = panel[c];
        to += taps;
        if (to >= geometry_.columns) to -= geometry_.columns - 1;  // the next tap
      }
    }
  }

  const PairParams& p_;
  const PatchGeometry geometry_;
  const int64_t rows_, neurons_, group_neurons_;
  const Split split_;
  Arena arena_;
  RowStatistics<T> statistics_{};
  Task tasks_[kMostTasks];
};

}  // namespace
}  // namespace ghl::cpu
