// sm90_dual_wgrad.h against a loop in double precision, run on the host by sm90_emulation.h; or on
// a GPU, see sm90_on_gpu.cu.
//
// Arguments: the numbers of the layers to test, all by default.
#include <random>
#include <string>

#include "../../csrc/cuda/sm90_dual_wgrad.h"
#include "../../csrc/cuda/sm90_maps.h"
#include "check.h"
#include "sm90_on_gpu.h"

namespace ghl::cuda::sm90 {
namespace {

struct Layer {
  const char* name;
  int batch, groups, neurons, channels;  // of one group the last two
  int in_size[2] = {1, 1}, kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0},
      dilation[2] = {1, 1};
  Competition competition = Competition::softmax;
  int splits = 1, spare = 0;  // spare: numbers between rows, or pixels, that belong to others
  bool in_tile = false, channels_last = true, sums_u = true;
  double tau = 1.0, poison = 0.0;

  int out_size(int d) const {
    return (in_size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  int rows() const { return batch * out_size(0) * out_size(1); }
  int all_neurons() const { return groups * neurons; }
  int columns() const { return channels * kernel[0] * kernel[1]; }
};

TensorMap map_of(const MapOfMatrix& of) {
  return {of.data, {of.sizes[0], of.sizes[1]}, {of.strides[0]}, {}, {}, {}};
}
TensorMap map_of(const MapOfImages& of) {
  TensorMap map{of.data, {}, {}, {}, {}, {}};
  std::copy_n(of.sizes, 4, map.sizes);
  std::copy_n(of.strides, 3, map.strides);
  std::copy_n(of.lower, 2, map.lower);
  std::copy_n(of.upper, 2, map.upper);
  std::copy_n(of.steps, 4, map.steps);
  return map;
}

template <class T>
class Case {
 public:
  explicit Case(const Layer& layer)
      : l(layer),
        pixel_((l.groups * l.channels + l.spare + 7) / 8 * 8),
        row_((l.all_neurons() + l.spare + 7) / 8 * 8) {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<uint4>& memory, size_t numbers) {
      memory.resize((numbers + 7) / 8);
      for (size_t i = 0; i < numbers; ++i) at(memory, i) = from_float<T>(normal(random));
    };
    fill(x_, size_t(l.batch) * l.in_size[0] * l.in_size[1] * pixel_);
    fill(y_, size_t(l.rows()) * row_);
    fill(g_, size_t(l.rows()) * row_);
    if (l.poison != 0) at(y_, row_ + 1) = from_float<T>(l.poison);
    find_statistics();
  }

  template <class Shape>
  void run() {
    const int64_t weights = int64_t(l.all_neurons()) * l.columns();
    G_.assign(l.splits * weights, NAN), H0_ = G_;
    u_sums_.assign(l.splits * l.all_neurons(), NAN);
    const DualWgradParams p = params();
    if (const char* why = unfit(p)) emulated::fail(why);
#ifdef GHL_ON_GPU
    const char* error = run_sm90_on_gpu(p, x_.size() * 16, y_.size() * 16, Shape::NEURONS == 64);
    if (error) emulated::fail(error);
#else
    emulate<Shape>(p);
#endif
    compare();
  }

 private:
  template <class Shape>
  void emulate(const DualWgradParams& p) {
    DualWgradArguments a{};
    a.p = p;
    a.geometry = geometry(p, Shape::NEURONS, Shape::COLUMNS);
    a.x_is_matrix = row_stride_of_x(p) != 0;
    a.x = a.x_is_matrix ? map_of(map_of_rows(p)) : map_of(map_of_images(p));
    a.y = map_of(map_of_signal(p.y, p)), a.g = map_of(map_of_signal(p.g, p));
    const dim3 grid{unsigned(a.geometry.neuron_tiles * a.geometry.column_tiles), unsigned(l.splits),
                    unsigned(l.groups)};
    emulation::launch(grid, kThreads, sizeof(typename Shape::Shared), [&] { launch<Shape>(a); });
  }

  template <class Shape>
  void launch(const DualWgradArguments& a) {
    switch (l.competition) {
      case Competition::softmax: return dual_wgrad_kernel<T, Shape, Competition::softmax>(a);
      case Competition::linear: return dual_wgrad_kernel<T, Shape, Competition::linear>(a);
      case Competition::hard: return dual_wgrad_kernel<T, Shape, Competition::hard>(a);
      case Competition::softhebb: return dual_wgrad_kernel<T, Shape, Competition::softhebb>(a);
    }
  }

  static T& at(std::vector<uint4>& memory, size_t i) {
    return reinterpret_cast<T*>(memory.data())[i];
  }
  static double number(const std::vector<uint4>& memory, size_t i) {
    return to_float(reinterpret_cast<const T*>(memory.data())[i]);
  }

  DualWgradParams params() {
    DualWgradParams p{};
    const int64_t width = pixel_, height = width * l.in_size[1];
    p.x = {x_.data(), height * l.in_size[0], 1, height, width};
    p.y = {y_.data(), row_, 1}, p.g = {g_.data(), row_, 1};
    p.dtype = std::is_same_v<T, bfloat16> ? Dtype::bfloat16 : Dtype::float16;
    p.rows = l.rows(), p.groups = l.groups, p.neurons = l.neurons, p.channels = l.channels;
    p.in_height = l.in_size[0], p.in_width = l.in_size[1];
    p.out_height = l.out_size(0), p.out_width = l.out_size(1);
    p.kernel_h = l.kernel[0], p.kernel_w = l.kernel[1];
    p.stride_h = l.stride[0], p.stride_w = l.stride[1];
    p.padding_h = l.padding[0], p.padding_w = l.padding[1];
    p.dilation_h = l.dilation[0], p.dilation_w = l.dilation[1];
    p.competition = l.competition, p.scale = float(M_LOG2E / l.tau);
    if (!l.in_tile) p.statistics = {largest_.data(), inverse_.data(), winner_.data()};
    p.G = G_.data(), p.H0 = H0_.data(), p.u_sums = l.sums_u ? u_sums_.data() : nullptr;
    const int blocks = (l.rows() + kRows - 1) / kRows;
    p.splits = l.splits, p.rows_per_split = (blocks + l.splits - 1) / l.splits * kRows;
    p.channels_last = l.channels_last;
    return p;
  }

  double y(int row, int k) const { return number(y_, size_t(row) * row_ + k); }
  double g(int row, int k) const { return number(g_, size_t(row) * row_ + k); }
  double x(int row, int group, int channel, int tap) const {
    const int out_w = l.out_size(1), positions = l.out_size(0) * out_w, position = row % positions;
    const int h = position / out_w * l.stride[0] - l.padding[0] + tap / l.kernel[1] * l.dilation[0];
    const int w = position % out_w * l.stride[1] - l.padding[1] + tap % l.kernel[1] * l.dilation[1];
    if (h < 0 || w < 0 || h >= l.in_size[0] || w >= l.in_size[1]) return 0;
    const size_t pixel = (size_t(row / positions) * l.in_size[0] + h) * l.in_size[1] + w;
    return number(x_, pixel * pixel_ + group * l.channels + channel);
  }

  void find_statistics() {
    for (int row = 0; row < l.rows(); ++row) {
      double largest = -INFINITY, sum = 0, nan = 1;
      int winner = INT32_MAX;
      for (int k = 0; k < l.all_neurons(); ++k) {
        if (y(row, k) > largest) largest = y(row, k), winner = k;
        if (std::isnan(y(row, k))) nan = NAN;
      }
      for (int k = 0; k < l.all_neurons(); ++k) sum += std::exp((y(row, k) - largest) / l.tau);
      const double softmax = std::isfinite(largest) ? 1 / sum : NAN;
      exact_inverse_.push_back(l.competition == Competition::hard ? nan : softmax);
      largest_.push_back(largest), inverse_.push_back(exact_inverse_.back());
      winner_.push_back(winner);
    }
  }

  double u(int row, int k) const {
    const bool wins = winner_[row] == k;
    const double inverse = exact_inverse_[row];
    if (l.competition == Competition::linear) return y(row, k);
    if (l.competition == Competition::hard) return wins ? inverse : 0 * inverse;
    const double power = std::exp((y(row, k) - largest_[row]) / l.tau) * inverse;
    return l.competition == Competition::softmax || wins ? power : -power;
  }

  double over_splits(const std::vector<float>& parts, int64_t index) const {
    const int64_t size = parts.size() / l.splits;
    double sum = 0;
    for (int split = 0; split < l.splits; ++split) sum += parts[split * size + index];
    return sum;
  }

  void compare() {
    const int taps = l.kernel[0] * l.kernel[1], rows = l.rows();
    const double rounding = std::is_same_v<T, float16> ? 1e-3 : 5e-3;
    std::vector<double> of_u(rows), of_g(rows), of_x(rows);
    for (int k = 0; k < l.all_neurons(); ++k) {
      double u_sum = 0, size = 0;
      for (int row = 0; row < rows; ++row) {
        of_u[row] = u(row, k), of_g[row] = g(row, k);
        u_sum += of_u[row], size += std::abs(of_u[row]);
      }
      if (l.sums_u)
        check::near(l.name, "u_sums", k, over_splits(u_sums_, k), u_sum, rounding * size);
      for (int column = 0; column < l.columns(); ++column) {
        const int tap = l.channels_last ? column / l.channels : column % taps;
        const int c = l.channels_last ? column % l.channels : column / taps;
        double G = 0, G_size = 0, H0 = 0, H0_size = 0;
        for (int row = 0; row < rows; ++row) {
          const double input = x(row, k / l.neurons, c, tap);
          G += of_g[row] * input, G_size += std::abs(of_g[row] * input);
          H0 += of_u[row] * input, H0_size += std::abs(of_u[row] * input);
        }
        const int64_t at = int64_t(k) * l.columns() + column;
        check::near(l.name, "G", at, over_splits(G_, at), G, 1e-6 * G_size);
        check::near(l.name, "H0", at, over_splits(H0_, at), H0, rounding * H0_size);
      }
    }
  }

  const Layer l;
  const int pixel_, row_;
  std::vector<uint4> x_, y_, g_;  // 16-byte aligned, as tensor maps want it
  std::vector<float> largest_, inverse_, G_, H0_, u_sums_;
  std::vector<double> exact_inverse_;
  std::vector<int32_t> winner_;
};

constexpr auto hard = Competition::hard, linear = Competition::linear,
               softhebb = Competition::softhebb;

// Rows, neurons and columns that end within and beyond a tile; fewer blocks than stages and more.
const Layer narrow[] = {
    // for tiles of 64 neurons
    {.name = "linear, 6 blocks, rows in the tile",
     .batch = 350,
     .groups = 1,
     .neurons = 64,
     .channels = 72,
     .in_tile = true,
     .tau = 0.25},
    {.name = "linear, one row",
     .batch = 1,
     .groups = 1,
     .neurons = 8,
     .channels = 8,
     .in_tile = true},
    {.name = "linear, an empty split",
     .batch = 130,
     .groups = 1,
     .neurons = 24,
     .channels = 264,
     .splits = 4},
    {.name = "linear, hard in the tile",
     .batch = 70,
     .groups = 1,
     .neurons = 40,
     .channels = 8,
     .competition = hard,
     .in_tile = true},
    {.name = "linear, softhebb in the tile",
     .batch = 70,
     .groups = 1,
     .neurons = 40,
     .channels = 8,
     .competition = softhebb,
     .in_tile = true},
    {.name = "linear, NaN",
     .batch = 70,
     .groups = 1,
     .neurons = 16,
     .channels = 8,
     .in_tile = true,
     .poison = NAN},
    {.name = "linear, infinity",
     .batch = 70,
     .groups = 1,
     .neurons = 16,
     .channels = 8,
     .in_tile = true,
     .poison = INFINITY},
    {.name = "linear, minus infinity",
     .batch = 70,
     .groups = 1,
     .neurons = 16,
     .channels = 8,
     .in_tile = true,
     .poison = -INFINITY},
    {.name = "linear, NaN in hard",
     .batch = 70,
     .groups = 1,
     .neurons = 16,
     .channels = 8,
     .competition = hard,
     .in_tile = true,
     .poison = NAN},
    {.name = "3x3, a tap a box",
     .batch = 2,
     .groups = 1,
     .neurons = 64,
     .channels = 64,
     .in_size = {7, 9},
     .kernel = {3, 3},
     .padding = {1, 1},
     .in_tile = true},
    {.name = "3x3, groups, weight (channels, taps), odd channels",
     .batch = 2,
     .groups = 2,
     .neurons = 20,
     .channels = 11,
     .in_size = {6, 5},
     .kernel = {3, 3},
     .padding = {1, 1},
     .competition = softhebb,
     .spare = 2,
     .channels_last = false},
};
const Layer wide[] = {
    // for tiles of 128 neurons
    {.name = "linear, more tiles than one",
     .batch = 300,
     .groups = 1,
     .neurons = 136,
     .channels = 136,
     .splits = 2,
     .spare = 8,
     .tau = 2.0},
    {.name = "linear, rows in the tile of 128",
     .batch = 200,
     .groups = 1,
     .neurons = 128,
     .channels = 64,
     .in_tile = true,
     .sums_u = false},
    {.name = "linear, u is y",
     .batch = 90,
     .groups = 1,
     .neurons = 72,
     .channels = 40,
     .competition = linear},
    {.name = "linear, hard",
     .batch = 90,
     .groups = 1,
     .neurons = 200,
     .channels = 8,
     .competition = hard},
    {.name = "1x1, dense",
     .batch = 3,
     .groups = 1,
     .neurons = 136,
     .channels = 72,
     .in_size = {5, 7}},
    {.name = "1x1, stride 2",
     .batch = 5,
     .groups = 1,
     .neurons = 72,
     .channels = 24,
     .in_size = {9, 10},
     .stride = {2, 2},
     .spare = 8},
    {.name = "3x2, strides, dilation",
     .batch = 3,
     .groups = 1,
     .neurons = 72,
     .channels = 72,
     .in_size = {19, 23},
     .kernel = {3, 2},
     .stride = {2, 3},
     .padding = {2, 1},
     .dilation = {1, 2},
     .splits = 2,
     .channels_last = false},
    {.name = "5x5 on images smaller than a block",
     .batch = 9,
     .groups = 1,
     .neurons = 136,
     .channels = 8,
     .in_size = {3, 4},
     .kernel = {5, 5},
     .padding = {2, 2},
     .competition = softhebb},
};

// The layers that are asked for; of the second dtype, every fourth.
template <class T>
void test(int count, char** numbers, int every) {
  int number = 0;
  const auto asked = [&](const Layer& layer) {
    const std::string name = std::to_string(number++);
    const bool yes = count < 2 ? number % every == 0
                               : std::find(numbers + 1, numbers + count, name) != numbers + count;
    if (yes) std::printf("%s: %s\n", name.c_str(), layer.name), std::fflush(stdout);
    return yes;
  };
  for (const Layer& layer : narrow)
    if (asked(layer)) Case<T>(layer).template run<Shape<64, 256>>();
  for (const Layer& layer : wide)
    if (asked(layer)) Case<T>(layer).template run<Shape<128, 128>>();
}

}  // namespace
}  // namespace ghl::cuda::sm90

int main(int count, char** numbers) {
  using namespace ghl::cuda;
  sm90::test<bfloat16>(count, numbers, 1);
  sm90::test<float16>(count, numbers, 4);
  return check::result();
}
