// logsumexp.h against a loop in double precision, on rows of every length, layout and kind.
#include <random>

#include "../../csrc/cuda/logsumexp.h"
#include "check.h"

namespace ghl::cuda {
namespace {

constexpr int kThreads = 64;
constexpr Competition kNoStatistics = Competition::linear;  // asks for the log-sum-exp

// y as (outer, inner, neurons); `offset` numbers lie before the first.
struct Layout {
  const char* name;
  int outer, inner, neurons;
  int64_t row, inner_stride, column, offset = 0;
  int rows() const { return outer * inner; }
  int64_t at(int row_, int k) const {
    return offset + row_ / inner * row + row_ % inner * inner_stride + k * column;
  }
  int64_t size() const {
    return at((outer - 1) * inner, 0) + (inner - 1) * inner_stride + (neurons - 1) * column + 1;
  }
};

Layout dense(const char* name, int rows, int neurons, int pitch = 0, int offset = 0) {
  return {name, rows, 1, neurons, pitch ? pitch : neurons, 0, 1, offset};
}

// What a row holds beside noise.
template <class T>
void put_special(std::vector<T>& y, const Layout& l, int row) {
  const auto set = [&](int k, double x) { y[l.at(row, k % l.neurons)] = from_float<T>(float(x)); };
  const auto set_all = [&](auto f) {
    for (int k = 0; k < l.neurons; ++k) set(k, f(k));
  };
  switch (row % 12) {
    case 1: return set(row, NAN);
    case 2: return set_all([](int) { return NAN; });
    case 3: return set(row, INFINITY);
    case 4: return set(l.neurons - 1, -INFINITY);
    case 5: return set_all([](int) { return -INFINITY; });
    case 6: return set_all([](int k) { return k % 3 ? 30000 : -30000; });
    case 7: return set(l.neurons / 2, 9), set(l.neurons - 1, 9), set(l.neurons / 3, 9);
    case 8: return set_all([](int) { return INFINITY; });
    case 9: return set_all([](int k) { return k * 0.25; });
    case 10: return set(0, -INFINITY), set(l.neurons - 1, INFINITY), set(l.neurons / 2, NAN);
    case 11: return set_all([](int k) { return -k * 0.25; });
  }
}

template <class T>
struct Case {
  const Layout& l;
  Competition competition;
  double tau;
  std::vector<T> y = std::vector<T>(l.size());
  std::vector<float> largest = std::vector<float>(l.rows(), NAN), inverse = largest, lse = largest;
  std::vector<int32_t> winner = std::vector<int32_t>(l.rows(), -7);

  void run() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (T& number : y) number = from_float<T>(3 * normal(random));
    if (l.column != 0 && (l.row != 0 || l.outer == 1))
      for (int row = 0; row < l.rows(); ++row) put_special(y, l, row);

    StatisticsParams p{};
    p.y = {y.data() + l.offset, l.row, l.column};
    p.dtype = sizeof(T) == 4                ? Dtype::float32
              : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
                                            : Dtype::float16;
    p.rows = l.rows(), p.neurons = l.neurons, p.inner = l.inner, p.inner_stride = l.inner_stride;
    p.competition = competition == kNoStatistics ? Competition::softmax : competition;
    p.scale = float(std::min(M_LOG2E / tau, 3.4028234663852886e38));
    if (competition == kNoStatistics)
      p.lse = lse.data();
    else
      p.statistics = {largest.data(), inverse.data(),
                      competition == Competition::softmax ? nullptr : winner.data()};
    const StatisticsArguments a = statistics_arguments(p, kThreads);
    with_statistics_kernel(a, 0, [&](auto type, auto wide, auto chosen) {
      emulation::launch({unsigned(statistics_blocks(a, kThreads)), 1, 1}, kThreads,
                        statistics_shared_bytes(a, kThreads),
                        [&] { statistics_kernel<decltype(type), chosen.value, wide.value>(a); });
      return 0;
    });
    for (int row = 0; row < l.rows(); ++row) compare(row);
  }

  double number(int row, int k) const { return to_float(y[l.at(row, k)]); }

  void compare(int row) const {
    double top = -INFINITY, total = 0;
    bool nan = false;
    int first = 0;
    for (int k = l.neurons - 1; k >= 0; --k) {
      nan = nan || std::isnan(number(row, k));
      if (number(row, k) >= top) top = number(row, k), first = k;
    }
    for (int k = 0; k < l.neurons; ++k) total += std::exp((number(row, k) - top) / tau);
    if (competition == kNoStatistics) {
      const double wanted = nan ? NAN : std::isinf(top) ? top : top / tau + std::log(total);
      const double bound = std::isfinite(wanted) ? 2e-6 * (1 + std::abs(wanted)) : 0;
      return check::near(l.name, "lse", row, lse[row], wanted, bound);
    }
    double wanted = std::isinf(top) ? NAN : 1 / total;
    if (competition == Competition::hard) wanted = nan ? NAN : 1;
    check::near(l.name, "largest", row, largest[row], top, 0);
    check::near(l.name, "inverse", row, inverse[row], wanted, 4e-6 * std::abs(wanted));
    if (competition != Competition::softmax && !nan)
      check::near(l.name, "winner", row, winner[row], first, 0);
  }
};

template <class T>
void test() {
  const Layout layouts[] = {
      dense("one neuron", 13, 1),
      dense("three neurons", 30, 3),
      dense("one chunk", 70, 8),
      dense("64 neurons", 40, 64),
      dense("a tail after the chunks", 14, 77, 80),
      dense("rows that are not aligned", 13, 77),
      dense("memory that is not aligned", 12, 64, 0, 1),
      dense("a warp for a row, twice over", 12, 1032),
      dense("a block for a row", 12, 2064),
      dense("a block for a row, a tail", 12, 2071, 2072),
      dense("a block for a row, number by number", 12, 533),
      {"one row for all", 14, 1, 64, 0, 0, 1},
      {"one number for all", 3, 4, 37, 0, 0, 0},
      {"channels_last, padded", 2, 7, 24, 7 * 24 + 8, 24, 1},
      {"channels_last, padded rows", 2, 7, 13, 7 * 14 + 3, 14, 1},
      {"NCHW", 2, 21, 5, 5 * 21, 1, 21},
      {"NCHW, many channels", 2, 21, 70, 70 * 21 + 1, 1, 21},
      {"transposed", 40, 1, 19, 1, 0, 40},
      {"every second number", 13, 1, 20, 40, 0, 2},
  };
  for (const Layout& l : layouts) {
    for (Competition c :
         {Competition::softmax, Competition::hard, Competition::softhebb, kNoStatistics}) {
      // one dtype meets them all
      const bool all = std::is_same_v<T, bfloat16>;
      if (all || c == Competition::softhebb || c == kNoStatistics) Case<T>{l, c, 0.7}.run();
    }
  }
  Case<T>{layouts[3], Competition::softhebb, 1e-40}.run();
  Case<T>{layouts[15], Competition::softmax, 1e-40}.run();
}

}  // namespace
}  // namespace ghl::cuda

int main() {
  ghl::cuda::test<float>();
  ghl::cuda::test<ghl::cuda::float16>();
  ghl::cuda::test<ghl::cuda::bfloat16>();
  return check::result();
}
