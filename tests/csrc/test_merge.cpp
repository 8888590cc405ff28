// merge.h against a loop in double precision: all choices, layers of every size and dtype in one
// launch, NaN and infinities; and bit for bit against itself on grids of other sizes.
#include <algorithm>
#include <random>
#include <vector>

#include "../../csrc/cuda/merge.h"
#include "check.h"

namespace ghl::cuda {
namespace {

constexpr int kThreads = 64, kCapacity = 12;
constexpr double kEpsilon = 2e-6;  // of a sum in float32, relative to its terms

struct Choices {
  Decay decay;
  Gate gate;
  Normalize normalize;
};

// Numbers of a dtype in memory of exactly their size, `offset` of them before the first.
class Numbers {
 public:
  Numbers() = default;
  Numbers(Dtype dtype, int64_t count, int offset = 0)
      : dtype(dtype), offset_(offset), bytes_((count + offset) * size(), char(0xff)) {}
  void* data() { return bytes_.data() + offset_ * size(); }
  const void* data() const { return bytes_.data() + offset_ * size(); }
  double operator[](int64_t i) const { return number_at(data(), dtype, i); }
  void set(int64_t i, double x) {
    const float number[1] = {float(x)};
    store_floats(data(), dtype, i, number);
  }
  const std::vector<char>& bytes() const { return bytes_; }
  Dtype dtype = Dtype::float32;

 private:
  int size() const { return dtype == Dtype::float32 ? 4 : 2; }
  int offset_ = 0;
  std::vector<char> bytes_;
};

struct Spec {
  const char* name;
  int neurons, columns;
  Dtype G, H0, w, totals, update;
  bool in_place = false;
  int offset = 0;
  double rows = 17;
};

constexpr Dtype f32 = Dtype::float32, f16 = Dtype::float16, b16 = Dtype::bfloat16;
constexpr Spec kSpecs[] = {
    {"27 columns", 5, 27, f32, f32, f32, f32, f32},
    {"64 columns", 9, 64, f32, f32, b16, f32, b16, false, 0, 0},
    {"a block for a neuron", 2, 1500, f32, f32, f16, f32, f32, true},
    {"a block for a neuron, number by number", 3, 1031, b16, b16, b16, b16, b16, true},
    {"one column", 7, 1, f16, f16, f16, f32, f16},
    {"no columns", 4, 0, f32, f32, f32, f32, f32},
    {"one neuron, not aligned", 1, 40, f16, f32, f32, f16, f32, false, 1},
    {"no neurons", 0, 5, f32, f32, f32, f32, f32},
    {"neurons change within four numbers", 53, 10, f32, f32, f32, f32, f16},
    {"of two 16-bit dtypes", 6, 132, b16, f16, f32, f32, f32},
    {"in place, G wider", 3, 36, f32, b16, b16, f32, b16, true},
};

struct Layer {
  Spec spec;
  Numbers G, H0, w, totals, update, neurons, layer, scratch, H0_before;

  Layer(const Spec& s, std::mt19937& random, int poisoned)
      : spec(s),
        G(s.G, weights(), s.offset),
        H0(s.H0, weights(), s.offset),
        w(s.w, weights(), s.offset),
        totals(s.totals, s.neurons + 1),
        update(s.update, s.in_place ? 0 : weights(), s.offset),
        neurons(f32, 3 * s.neurons),
        layer(f32, 3),
        scratch(f32, 2 * s.neurons) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < weights(); ++i) {
      G.set(i, i % 7 == 3 ? 0.0f : normal(random));
      H0.set(i, s.columns == 1 ? 0.0f : 2 * normal(random));
      w.set(i, i % 11 == 5 ? 0.0f : 0.3f * normal(random));
    }
    for (int k = 0; k < s.neurons; ++k) totals.set(k, normal(random));
    totals.set(s.neurons, s.rows);
    const int64_t i = weights() * 2 / 3;
    if (poisoned == 0) G.set(i, NAN);
    if (poisoned == 1) H0.set(i, NAN);
    if (poisoned == 2) H0.set(i, INFINITY);
    if (poisoned == 3) w.set(i, NAN);
    if (poisoned == 4) totals.set(0, INFINITY), G.set(3, -INFINITY);
    if (poisoned == 8) H0.set(i, -INFINITY);
    H0_before = H0;
  }

  int64_t weights() const { return int64_t(spec.neurons) * spec.columns; }
  const Numbers& result() const { return spec.in_place ? H0 : update; }

  MergeLayer arguments() {
    MergeLayer m{};
    m.G = G.data(), m.H0 = H0.data(), m.w = w.data(), m.totals = totals.data();
    m.G_dtype = spec.G, m.H0_dtype = spec.H0, m.w_dtype = spec.w, m.totals_dtype = spec.totals;
    m.update_dtype = spec.update;
    m.update = spec.in_place ? H0.data() : update.data();
    m.neurons = static_cast<float*>(neurons.data());
    m.layer = static_cast<float*>(layer.data());
    m.scratch = static_cast<float*>(scratch.data());
    m.columns = spec.columns, m.out_channels = spec.neurons;
    return m;
  }
};

template <int CAPACITY>
void merge(const std::vector<MergeLayer>& layers, const Choices& c, unsigned blocks) {
  const auto table =
      table_of<CAPACITY>(layers.data(), int32_t(layers.size()), c.decay, c.gate, c.normalize);
  const auto run = [&](const std::function<void()>& kernel) {
    emulation::launch({blocks, 1, 1}, kThreads, merge_shared_bytes(kThreads), kernel, true);
  };
  if constexpr (CAPACITY == 1)
    run([&] { measure_kernel(table); }), run([&] { combine_kernel(table); });
  else
    run([&] { merge_kernel<CAPACITY>(table); });
}

// All layers in one launch, or each `alone` in two of its own.
std::vector<Layer> merged(const Choices& c, unsigned blocks, bool poisoned, bool alone = false) {
  std::mt19937 random(3);
  std::vector<Layer> layers;
  layers.reserve(kCapacity);
  for (const Spec& spec : kSpecs)
    layers.emplace_back(spec, random, poisoned ? int(layers.size()) : -1);
  std::vector<MergeLayer> all;
  for (Layer& layer : layers) {
    // in place, the update must have the dtype of H0
    if (layer.spec.in_place && layer.spec.update != layer.spec.H0) std::abort();
    all.push_back(layer.arguments());
  }
  if (!alone) merge<kCapacity>(all, c, blocks);
  for (size_t i = 0; alone && i < all.size(); ++i) merge<1>({all[i]}, c, blocks);
  return layers;
}

double larger_or_nan(double a, double b) {
  return std::isnan(a) || a > b ? a : b;
}

// A result in double precision, and how far float32 may be from it.
struct Value {
  double value = 0, error = 0;
  void add(double term, double term_error) {
    value += term;
    error += term_error + kEpsilon * std::abs(term);
  }
};

class Expected {
 public:
  Expected(const Layer& layer, const Choices& c) : l(layer), c_(c), columns_(layer.spec.columns) {
    for (int k = 0; k < l.spec.neurons; ++k) measure(k);
  }

  void compare() const {
    const char* name = l.spec.name;
    Value whole[3];
    for (int which = 0; which < 3; ++which) {
      for (int k = 0; k < l.spec.neurons; ++k) {
        const Value& v = sums_[3 * k + which];
        const int64_t at = which * l.spec.neurons + k;
        check::near(name, "neurons", at, l.neurons[at], v.value, v.error);
        whole[which].add(v.value, v.error);
      }
      check::near(name, "layer", which, l.layer[which], whole[which].value, whole[which].error);
    }
    for (int64_t i = 0; i < l.weights(); ++i) compare_update(i);
  }

 private:
  void measure(int k) {
    Value s, GH, GG, HH;
    for (int64_t i = k * columns_; i < (k + 1) * columns_; ++i)
      if (c_.decay == Decay::oja) s.add(l.H0_before[i] * l.w[i], 0);
    if (c_.decay == Decay::instar) s.value = l.totals[k];
    for (int64_t i = k * columns_; i < (k + 1) * columns_; ++i) {
      const double decay = c_.decay == Decay::none ? 0 : s.value * l.w[i];
      const double H = l.H0_before[i] - decay, G = l.G[i];
      const double of_s = c_.decay == Decay::oja ? s.error * std::abs(l.w[i]) : 0;
      const double error = of_s + 1e-7 * std::abs(H);
      H_.push_back({H, error});
      largest_.value = larger_or_nan(std::abs(H), largest_.value);
      largest_.error = std::max(largest_.error, error);
      GH.add(G * H, std::abs(G) * error);
      GG.add(G * G, 0);
      HH.add(H * H, 2 * std::abs(H) * error);
    }
    for (const Value& v : {GH, GG, HH}) sums_.push_back(v);
  }

  void compare_update(int64_t i) const {
    const double G = l.G[i], sign = G > 0 ? 1 : G < 0 ? -1 : G;
    Value divisor{1, 0};
    if (c_.normalize == Normalize::absmax) divisor = {largest_.value + 1e-30, largest_.error};
    if (c_.normalize == Normalize::mean) divisor.value = std::max(1.0, l.totals[l.spec.neurons]);
    const double H = H_[i].value / divisor.value;
    double error = (H_[i].error + std::abs(H) * divisor.error) / divisor.value;
    double wanted = c_.gate == Gate::hebb ? -H : sign * std::abs(H);
    if (c_.gate == Gate::sign_only) wanted = sign;
    if (c_.gate == Gate::gradient) wanted = G;
    if (c_.gate == Gate::sign_only || c_.gate == Gate::gradient) error = 0;
    const Dtype dtype = l.spec.update;
    const double rounding = dtype == f32 ? 2e-7 : dtype == f16 ? 1.0 / 2048 : 1.0 / 256;
    error += rounding * std::abs(wanted) + (dtype == f16 ? 6e-8 : 0);
    check::near(l.spec.name, "update", i, l.result()[i], wanted, error);
  }

  const Layer& l;
  Choices c_;
  int64_t columns_;
  std::vector<Value> H_, sums_;
  Value largest_;
};

void test_against_double() {
  int run = 0;
  for (Decay decay : {Decay::oja, Decay::instar, Decay::none})
    for (Gate gate : {Gate::sign, Gate::hebb, Gate::sign_only, Gate::gradient})
      for (Normalize normalize : {Normalize::absmax, Normalize::mean, Normalize::none})
        for (bool poisoned : {false, true}) {
          const Choices choices{decay, gate, normalize};
          if (poisoned && normalize != Normalize::absmax) continue;
          ++run;
          for (const Layer& layer : merged(choices, 1 + run % 3, poisoned, run % 5 < 2))
            Expected(layer, choices).compare();
        }
}

// No result may depend on the size of the grid, or on the layers beside it.
void test_grids() {
  for (Decay decay : {Decay::oja, Decay::none}) {
    const Choices choices{decay, Gate::sign, Normalize::absmax};
    const std::vector<Layer> one = merged(choices, 1, false);
    for (int run = 0; run < 4; ++run) {
      const unsigned blocks = run % 2 ? 5 : 2;
      const std::vector<Layer> other = merged(choices, blocks, false, run >= 2);
      for (size_t i = 0; i < one.size(); ++i) {
        const auto same = [&](const Numbers& a, const Numbers& b) {
          return a.bytes() == b.bytes();
        };
        const bool alike = same(one[i].result(), other[i].result()) &&
                           same(one[i].neurons, other[i].neurons) &&
                           same(one[i].layer, other[i].layer);
        check::near(one[i].spec.name, "the same on any grid", run, alike, 1, 0);
      }
    }
  }
}

}  // namespace
}  // namespace ghl::cuda

int main() {
  ghl::cuda::test_against_double();
  ghl::cuda::test_grids();
  return check::result();
}
