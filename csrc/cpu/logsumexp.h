// log sum over neurons of exp(y / tau), for every row.
//
// Costs one exp per element and one read of y; keeps one tile of y per thread.
#pragma once

#include "kernels.h"
#include "pair.h"
#include "signals.h"

namespace ghl::cpu {
namespace {

template <class In, class T>
class LogsumexpKernel {
 public:
  LogsumexpKernel(const LogsumexpParams& p, int64_t threads, void* workspace)
      : p_(p), rows_(rows_of(p.y)), neurons_(p.y.size[1]), arena_(workspace) {
    tasks_ = minimum(minimum(threads, kMostTasks), divide_up(rows_, kTileRows));
    y_ = arena_.take<T>(tasks_ * signal_tile_elements(neurons_));
    statistics_ = take_statistics<T>(arena_, tasks_ * kTileRows);
  }

  int64_t workspace_bytes() const { return arena_.used(); }

  void run(const Threads& threads) {
    const int64_t tiles = divide_up(rows_, kTileRows);
    threads.run(tasks_, [&](int64_t task) {
      const int64_t share = divide_up(tiles, tasks_);
      for (int64_t tile = task * share; tile < minimum((task + 1) * share, tiles); ++tile)
        run_tile(task, tile * kTileRows, minimum(kTileRows, rows_ - tile * kTileRows));
    });
  }

 private:
  void run_tile(int64_t task, int64_t row0, int64_t rows) {
    T* y = y_ + task * signal_tile_elements(neurons_);
    const RowStatistics<T> of = from_row(statistics_, task * kTileRows);
    const T tau = static_cast<T>(p_.tau);
    gather<In>(p_.y, 0, neurons_, row0, rows, y);
    row_statistics(y, neurons_, rows, inverse<T>(p_.tau), of);
    for (int64_t m = 0; m < rows; ++m) {
      const T maximum = of.maximum[m];
      static_cast<T*>(p_.lse)[row0 + m] =
          __builtin_isinf(maximum) ? maximum : maximum / tau + std::log(of.sum[m]);
    }
  }

  const LogsumexpParams& p_;
  const int64_t rows_, neurons_;
  int64_t tasks_;
  Arena arena_;
  T* y_;
  RowStatistics<T> statistics_{};
};

}  // namespace
}  // namespace ghl::cpu
