// dual_wgrad.h against a loop in double precision, on shapes that reach every branch.
//
// Arguments: the dtypes to test (bfloat16 float16 tf32 tf32x3), all by default.
#include <random>
#include <string>

#include "../../csrc/cuda/dual_wgrad.h"
#include "check.h"

namespace ghl::cuda {
namespace {

struct Layer {
  const char* name;
  int batch, groups, neurons, channels;  // of one group the last two
  int in_size[2], kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
  Competition competition = Competition::softmax;
  int tile = 0, splits = 1;
  bool in_tile = false, channels_last = true, nchw = false, expanded_g = false;
  double tau = 1.0, poison = 0.0;  // poison: put into one y of the second row

  int out_size(int d) const {
    return (in_size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  int rows() const { return batch * out_size(0) * out_size(1); }
  int all_neurons() const { return groups * neurons; }
  int columns() const { return channels * kernel[0] * kernel[1]; }
  bool pointwise() const { return in_size[0] * in_size[1] == 1; }
};

template <class T>
class Case {
 public:
  Case(const Layer& layer, Precision precision) : l(layer), precision_(precision) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<T>& numbers, size_t size) {
      numbers.resize(size);
      for (auto& number : numbers) number = from_float<T>(normal(random));
    };
    fill(x_, size_t(l.batch) * l.groups * l.channels * l.in_size[0] * l.in_size[1]);
    fill(y_, size_t(l.rows()) * l.all_neurons());
    fill(g_, l.expanded_g ? 1 : y_.size());
    if (l.poison != 0 && l.rows() > 1) y_[y_at(1, 1 % l.all_neurons())] = from_float<T>(l.poison);
    find_statistics();
  }

  void run() {
    if (precision_ == Precision::tf32x3)
      run_with<Precision::tf32x3>();
    else
      run_with<Precision::tf32>();
  }

 private:
  template <Precision P>
  void run_with() {
    if (l.pointwise() && l.tile == 0) return run_shape<CompiledShape<T, P, true, 0>>();
    if (!l.pointwise() && l.tile == 0) return run_shape<CompiledShape<T, P, false, 0>>();
    if constexpr (P == Precision::tf32) {
      if (l.pointwise() && l.tile == 1) return run_shape<CompiledShape<T, P, true, 1>>();
      if (!l.pointwise() && l.tile == 1) return run_shape<CompiledShape<T, P, false, 1>>();
      if constexpr (sizeof(T) == 2)
        if (l.pointwise() && l.tile == 2) return run_shape<CompiledShape<T, P, true, 2>>();
    }
  }

  template <class Shape>
  void run_shape() {
    const DualWgradArguments arguments = dual_wgrad_arguments(params(Shape::ROWS), Shape::COLUMNS);
    const Tile tile = Shape::tile();
    emulation::launch(dual_wgrad_grid(arguments, tile), tile.threads, tile.shared_bytes,
                      [&] { dual_wgrad_kernel<Shape>(arguments); });
    compare();
  }

  DualWgradParams params(int tile_rows) {
    const int64_t weights = int64_t(l.all_neurons()) * l.columns();
    const int blocks = (l.rows() + tile_rows - 1) / tile_rows;
    const int rows_per_split = (blocks + l.splits - 1) / l.splits * tile_rows;
    splits_ = (l.rows() + rows_per_split - 1) / rows_per_split;
    G_.assign(splits_ * weights, NAN);
    H0_.assign(splits_ * weights, NAN);
    u_sums_.assign(splits_ * l.all_neurons(), NAN);

    DualWgradParams p{};
    const int64_t all = l.groups * l.channels, height = l.in_size[0], width = l.in_size[1];
    p.x = l.nchw ? Images{x_.data(), all * height * width, height * width, width, 1}
                 : Images{x_.data(), all * height * width, 1, all * width, all};
    p.y = matrix(y_), p.g = l.expanded_g ? Matrix{g_.data(), 0, 0} : matrix(g_);
    p.dtype = sizeof(T) == 4                ? Dtype::float32
              : std::is_same_v<T, bfloat16> ? Dtype::bfloat16
                                            : Dtype::float16;
    p.precision = precision_;
    p.rows = l.rows(), p.groups = l.groups, p.neurons = l.neurons, p.channels = l.channels;
    p.in_height = l.in_size[0], p.in_width = l.in_size[1];
    p.out_height = l.out_size(0), p.out_width = l.out_size(1);
    p.kernel_h = l.kernel[0], p.kernel_w = l.kernel[1];
    p.stride_h = l.stride[0], p.stride_w = l.stride[1];
    p.padding_h = l.padding[0], p.padding_w = l.padding[1];
    p.dilation_h = l.dilation[0], p.dilation_w = l.dilation[1];
    p.competition = l.competition, p.scale = float(M_LOG2E / l.tau);
    if (!l.in_tile) p.statistics = {largest_.data(), inverse_.data(), winner_.data()};
    p.G = G_.data(), p.H0 = H0_.data(), p.u_sums = u_sums_.data();
    p.splits = splits_, p.rows_per_split = rows_per_split, p.channels_last = l.channels_last;
    return p;
  }

  // Neurons side by side, or, as from NCHW images of one position, rows side by side.
  Matrix matrix(const std::vector<T>& t) const {
    return l.nchw ? Matrix{t.data(), 1, l.rows()} : Matrix{t.data(), l.all_neurons(), 1};
  }
  size_t y_at(int row, int neuron) const {
    return l.nchw ? size_t(neuron) * l.rows() + row : size_t(row) * l.all_neurons() + neuron;
  }
  double y(int row, int neuron) const { return to_float(y_[y_at(row, neuron)]); }
  double g(int row, int neuron) const {
    return to_float(l.expanded_g ? g_[0] : g_[y_at(row, neuron)]);
  }

  // The input under a tap, 0 off the image.
  double x(int row, int group, int channel, int tap) const {
    const int out_w = l.out_size(1), positions = l.out_size(0) * out_w;
    const int image = row / positions, position = row % positions;
    const int h = position / out_w * l.stride[0] - l.padding[0] + tap / l.kernel[1] * l.dilation[0];
    const int w = position % out_w * l.stride[1] - l.padding[1] + tap % l.kernel[1] * l.dilation[1];
    if (h < 0 || w < 0 || h >= l.in_size[0] || w >= l.in_size[1]) return 0;
    const int c = group * l.channels + channel, all = l.groups * l.channels;
    const size_t at = l.nchw ? ((size_t(image) * all + c) * l.in_size[0] + h) * l.in_size[1] + w
                             : ((size_t(image) * l.in_size[0] + h) * l.in_size[1] + w) * all + c;
    return to_float(x_[at]);
  }

  void find_statistics() {
    for (int row = 0; row < l.rows(); ++row) {
      double largest = -INFINITY, sum = 0;
      int winner = INT32_MAX;
      for (int k = 0; k < l.all_neurons(); ++k) {
        if (y(row, k) > largest) largest = y(row, k), winner = k;
      }
      bool nan = false;
      for (int k = 0; k < l.all_neurons(); ++k) {
        sum += std::exp((y(row, k) - largest) / l.tau);
        nan |= std::isnan(y(row, k));
      }
      double inverse = std::isfinite(largest) ? 1 / sum : NAN;
      if (l.competition == Competition::hard) inverse = nan ? NAN : 1;
      largest_.push_back(largest), inverse_.push_back(inverse), winner_.push_back(winner);
      exact_inverse_.push_back(inverse);
    }
  }

  double u(int row, int k) const {
    if (l.competition == Competition::linear) return y(row, k);
    const bool wins = winner_[row] == k;
    if (l.competition == Competition::hard)
      return wins ? exact_inverse_[row] : 0 * exact_inverse_[row];
    const double power = std::exp((y(row, k) - largest_[row]) / l.tau) * exact_inverse_[row];
    return l.competition == Competition::softmax || wins ? power : -power;
  }

  double sum_of_splits(const std::vector<float>& parts, int64_t index, int64_t size) const {
    double sum = 0;
    for (int split = 0; split < splits_; ++split) sum += parts[split * size + index];
    return sum;
  }

  void compare() {
    const int64_t weights = int64_t(l.all_neurons()) * l.columns();
    const int taps = l.kernel[0] * l.kernel[1];
    // Of the sum of magnitudes: what the numbers of the dtype lose, and u when it is rounded.
    const double product = sizeof(T) == 2 ? 1e-6 : precision_ == Precision::tf32 ? 2e-3 : 4e-7;
    const double rounding = sizeof(T) == 4 ? product : std::is_same_v<T, float16> ? 1e-3 : 5e-3;
    for (int k = 0; k < l.all_neurons(); ++k) {
      double u_sum = 0, magnitude = 0;
      for (int row = 0; row < l.rows(); ++row) u_sum += u(row, k), magnitude += std::abs(u(row, k));
      check::near(l.name, "u_sums", k, sum_of_splits(u_sums_, k, l.all_neurons()), u_sum,
                  (rounding + 1e-5) * magnitude);
      for (int c = 0; c < l.channels; ++c) {
        for (int tap = 0; tap < taps; ++tap) {
          double G = 0, G_size = 0, H0 = 0, H0_size = 0;
          for (int row = 0; row < l.rows(); ++row) {
            const double input = x(row, k / l.neurons, c, tap);
            G += g(row, k) * input, G_size += std::abs(g(row, k) * input);
            H0 += u(row, k) * input, H0_size += std::abs(u(row, k) * input);
          }
          const int column = l.channels_last ? tap * l.channels + c : c * taps + tap;
          const int64_t at = int64_t(k) * l.columns() + column;
          check::near(l.name, "G", at, sum_of_splits(G_, at, weights), G, product * G_size);
          check::near(l.name, "H0", at, sum_of_splits(H0_, at, weights), H0,
                      (rounding + 2e-6) * H0_size);
        }
      }
    }
  }

  const Layer l;
  const Precision precision_;
  int splits_ = 0;
  std::vector<T> x_, y_, g_;
  std::vector<float> largest_, inverse_, G_, H0_, u_sums_;
  std::vector<double> exact_inverse_;
  std::vector<int32_t> winner_;
};

constexpr auto hard = Competition::hard, linear = Competition::linear,
               softhebb = Competition::softhebb;

std::vector<Layer> layers() {
  return {
      {.name = "linear, more than a tile in every dimension, splits",
       .batch = 165,
       .groups = 1,
       .neurons = 72,
       .channels = 136,
       .in_size = {1, 1},
       .splits = 3},
      {.name = "linear, rows in the tile",
       .batch = 37,
       .groups = 1,
       .neurons = 24,
       .channels = 16,
       .in_size = {1, 1},
       .in_tile = true,
       .tau = 0.25},
      {.name = "linear, numbers one by one",
       .batch = 21,
       .groups = 1,
       .neurons = 5,
       .channels = 3,
       .in_size = {1, 1},
       .in_tile = true},
      {.name = "linear, one neuron, one row",
       .batch = 1,
       .groups = 1,
       .neurons = 1,
       .channels = 8,
       .in_size = {1, 1},
       .in_tile = true},
      {.name = "linear, hard, in the tile",
       .batch = 40,
       .groups = 1,
       .neurons = 16,
       .channels = 8,
       .in_size = {1, 1},
       .competition = hard,
       .in_tile = true},
      {.name = "linear, softhebb, in the tile",
       .batch = 40,
       .groups = 1,
       .neurons = 16,
       .channels = 8,
       .in_size = {1, 1},
       .competition = softhebb,
       .in_tile = true},
      {.name = "linear, hard",
       .batch = 40,
       .groups = 1,
       .neurons = 80,
       .channels = 8,
       .in_size = {1, 1},
       .competition = hard},
      {.name = "linear, softhebb",
       .batch = 40,
       .groups = 1,
       .neurons = 80,
       .channels = 8,
       .in_size = {1, 1},
       .competition = softhebb},
      {.name = "linear, y is u",
       .batch = 40,
       .groups = 1,
       .neurons = 16,
       .channels = 8,
       .in_size = {1, 1},
       .competition = linear},
      {.name = "linear, expanded g, columns apart",
       .batch = 19,
       .groups = 1,
       .neurons = 9,
       .channels = 16,
       .in_size = {1, 1},
       .nchw = true,
       .expanded_g = true},
      {.name = "linear, large tile",
       .batch = 70,
       .groups = 1,
       .neurons = 136,
       .channels = 72,
       .in_size = {1, 1},
       .tile = 1,
       .splits = 2},
      {.name = "linear, large tile, rows in the tile",
       .batch = 35,
       .groups = 1,
       .neurons = 104,
       .channels = 8,
       .in_size = {1, 1},
       .tile = 1,
       .in_tile = true},
      {.name = "linear, long tile, rows in the tile",
       .batch = 35,
       .groups = 1,
       .neurons = 200,
       .channels = 40,
       .in_size = {1, 1},
       .tile = 2,
       .in_tile = true},
      {.name = "linear, NaN",
       .batch = 9,
       .groups = 1,
       .neurons = 8,
       .channels = 8,
       .in_size = {1, 1},
       .in_tile = true,
       .poison = NAN},
      {.name = "linear, NaN in hard",
       .batch = 9,
       .groups = 1,
       .neurons = 8,
       .channels = 8,
       .in_size = {1, 1},
       .competition = hard,
       .in_tile = true,
       .poison = NAN},
      {.name = "linear, infinity",
       .batch = 9,
       .groups = 1,
       .neurons = 8,
       .channels = 8,
       .in_size = {1, 1},
       .in_tile = true,
       .poison = INFINITY},
      {.name = "linear, minus infinity",
       .batch = 9,
       .groups = 1,
       .neurons = 8,
       .channels = 8,
       .in_size = {1, 1},
       .in_tile = true,
       .poison = -INFINITY},
      {.name = "3x3",
       .batch = 2,
       .groups = 1,
       .neurons = 16,
       .channels = 8,
       .in_size = {7, 5},
       .kernel = {3, 3},
       .padding = {1, 1},
       .splits = 2,
       .in_tile = true},
      {.name = "3x3, strides, dilation, weight (channels, taps)",
       .batch = 2,
       .groups = 1,
       .neurons = 72,
       .channels = 16,
       .in_size = {9, 12},
       .kernel = {3, 2},
       .stride = {2, 3},
       .padding = {2, 1},
       .dilation = {1, 2},
       .channels_last = false},
      {.name = "3x3, groups",
       .batch = 2,
       .groups = 3,
       .neurons = 8,
       .channels = 8,
       .in_size = {4, 5},
       .kernel = {3, 3},
       .padding = {1, 1},
       .competition = softhebb},
      {.name = "depthwise",
       .batch = 2,
       .groups = 5,
       .neurons = 2,
       .channels = 1,
       .in_size = {4, 5},
       .kernel = {3, 3},
       .padding = {1, 1}},
      {.name = "stem of three channels, NCHW",
       .batch = 2,
       .groups = 1,
       .neurons = 16,
       .channels = 3,
       .in_size = {9, 9},
       .kernel = {5, 5},
       .stride = {2, 2},
       .padding = {2, 2},
       .channels_last = false,
       .nchw = true},
      {.name = "1x1, stride 2",
       .batch = 2,
       .groups = 1,
       .neurons = 16,
       .channels = 24,
       .in_size = {5, 6},
       .stride = {2, 2},
       .competition = hard},
      {.name = "3x3, large tile",
       .batch = 2,
       .groups = 1,
       .neurons = 136,
       .channels = 16,
       .in_size = {5, 6},
       .kernel = {3, 3},
       .padding = {1, 1},
       .tile = 1,
       .splits = 2},
  };
}

template <class T>
void test(Precision precision) {
  for (const Layer& layer : layers()) {
    if (layer.tile > 0 && precision == Precision::tf32x3) continue;
    if (layer.tile > 1 && sizeof(T) == 4) continue;
    Case<T>(layer, precision).run();
  }
}

void test_division() {
  for (int64_t divisor : {1, 2, 3, 7, 49, 3136, 50176, 65537, 2147418111}) {
    const Division division = Division::by(int32_t(divisor));
    for (int64_t n : {int64_t(0), divisor - 1, divisor, 5 * divisor - 1, int64_t(2147483647)}) {
      if (n <= INT32_MAX)
        check::near("division", "quotient", n, division.of(uint32_t(n)), n / divisor, 0);
    }
  }
}

}  // namespace
}  // namespace ghl::cuda

int main(int count, char** names) {
  using namespace ghl::cuda;
  test_division();
  const auto asked = [&](const std::string& name) {
    return count < 2 || std::find(names + 1, names + count, name) != names + count;
  };
  if (asked("bfloat16")) test<bfloat16>(Precision::tf32);
  if (asked("float16")) test<float16>(Precision::tf32);
  if (asked("tf32")) test<float>(Precision::tf32);
  if (asked("tf32x3")) test<float>(Precision::tf32x3);
  return check::result();
}
