// The update of a whole layer from its sums: Oja term, largest magnitude, gate, statistics.
//
// Two passes over the weight: H and the statistics, then normalisation and gate. Reads G, H0 and w,
// writes H (into the update's memory), reads it and G again and writes the update; 7 * size of w.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ghl::cpu {
namespace {

template <class T>
struct NeuronSums {
  Vector<T> gh{}, gg{}, hh{}, largest{};
};

template <class T>
class MergeKernel {
 public:
  explicit MergeKernel(const MergeParams& p) : p_(p) {}

  void run(const Threads& threads) {
    constexpr int64_t most_tasks = 256;
    T largest[most_tasks];
    const int64_t tasks = minimum(minimum(threads.count, most_tasks), p_.out_channels);
    const int64_t share = divide_up(p_.out_channels, tasks);
    const auto each_neuron = [&](int64_t task, auto&& f) {
      for (int64_t k = task * share; k < minimum((task + 1) * share, p_.out_channels); ++k) f(k);
    };
    threads.run(tasks, [&](int64_t task) {
      largest[task] = 0;
      each_neuron(task, [&](int64_t k) { largest[task] = larger(largest[task], decay(k)); });
    });
    for (int64_t task = 1; task < tasks; ++task) largest[0] = larger(largest[0], largest[task]);
    sum_layer();
    const T divisor = normalizer(largest[0]);
    threads.run(tasks,
                [&](int64_t task) { each_neuron(task, [&](int64_t k) { gate(k, divisor); }); });
  }

 private:
  const T* row(const void* matrix, int64_t k) const {
    return static_cast<const T*>(matrix) + k * p_.row_size;
  }
  T* update(int64_t k) const { return static_cast<T*>(p_.update) + k * p_.row_size; }
  T total(int64_t k) const { return static_cast<const T*>(p_.totals)[k]; }

  // H of one neuron into the update's memory; its statistics; returns its largest |H|.
  T decay(int64_t k) {
    const T *G = row(p_.G, k), *H0 = row(p_.H0, k), *w = row(p_.w, k);
    T s = p_.decay == Decay::instar ? total(k) : T(0);
    if (p_.decay == Decay::oja) {
      Vector<T> dot{};
      for_each_vector<T>(p_.row_size, [&](int64_t i, int64_t count) {
        dot += load_some(H0 + i, count) * load_some(w + i, count);
      });
      s = sum_of_lanes<T>(dot);
    }
    NeuronSums<T> sums;
    for_each_vector<T>(p_.row_size, [&](int64_t i, int64_t count) {
      const Vector<T> g = load_some(G + i, count), h0 = load_some(H0 + i, count);
      Vector<T> h = p_.decay == Decay::none ? h0 : h0 - s * load_some(w + i, count);
      for (int64_t lane = count; lane < kLanes<T>; ++lane) h[lane] = 0;  // s may be infinite
      const Vector<T> magnitude = h < 0 ? -h : h;
      sums.gh += g * h;
      sums.gg += g * g;
      sums.hh += h * h;
      sums.largest = larger_of_lanes<T>(sums.largest, magnitude);
      store_some(update(k) + i, h, count);
    });
    T* neurons = static_cast<T*>(p_.neurons);
    neurons[k] = sum_of_lanes<T>(sums.gh);
    neurons[p_.out_channels + k] = sum_of_lanes<T>(sums.gg);
    neurons[2 * p_.out_channels + k] = sum_of_lanes<T>(sums.hh);
    T largest = 0;
    for (int64_t i = 0; i < kLanes<T>; ++i) largest = larger(largest, sums.largest[i]);
    return largest;
  }

  void sum_layer() {
    const T* neurons = static_cast<const T*>(p_.neurons);
    for (int64_t statistic = 0; statistic < 3; ++statistic) {
      double sum = 0;
      for (int64_t k = 0; k < p_.out_channels; ++k) sum += neurons[statistic * p_.out_channels + k];
      static_cast<T*>(p_.layer)[statistic] = static_cast<T>(sum);
    }
  }

  T normalizer(T largest) const {
    if (p_.normalize == Normalize::absmax) return largest + T(1e-30);
    if (p_.normalize == Normalize::mean) return larger(T(1), total(p_.out_channels));
    return 1;
  }

  void gate(int64_t k, T divisor) {
    const T* G = row(p_.G, k);
    T* H = update(k);
    for_each_vector<T>(p_.row_size, [&](int64_t i, int64_t count) {
      const Vector<T> g = load_some(G + i, count), h = load_some(H + i, count) / divisor;
      // NaN in G is a sign of NaN: the last alternative, which is G itself.
      const Vector<T> one = broadcast(T(1));
      const Vector<T> sign = g > 0 ? one : g < 0 ? -one : g;
      const Vector<T> magnitude = h < 0 ? -h : h;
      store_some(H + i, choose(g, h, sign, magnitude), count);
    });
  }

  Vector<T> choose(Vector<T> g, Vector<T> h, Vector<T> sign, Vector<T> magnitude) const {
    switch (p_.gate) {
      case Gate::sign: return sign * magnitude;
      case Gate::hebb: return -h;
      case Gate::sign_only: return sign;
      default: return g;
    }
  }

  const MergeParams& p_;
};

}  // namespace
}  // namespace ghl::cpu
