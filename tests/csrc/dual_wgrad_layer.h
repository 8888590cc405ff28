// A small layer, its tensors, and its G, H0 and sums of u by loops in double precision: what the
// tests of both forms of the dual weight gradient run and compare with.
#pragma once

#include <random>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/params.h"
#include "check.h"

namespace ghl::cuda {

struct Layer {
  const char* name;
  int batch, groups, neurons, channels;  // of one group the last two
  int in_size[2] = {1, 1}, kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0},
      dilation[2] = {1, 1};
  Competition competition = Competition::softmax;
  int tile = 0, splits = 1;
  int share = 0;  // blocks of rows of a split; as many for each of them if 0
  // Numbers between rows, or pixels, that belong to others: as many, up to a multiple of 8.
  int spare = 0;
  int step = 0;  // numbers from a pixel to the next, fewer than they have where they overlap
  bool in_tile = false;  // the kernel makes the row statistics
  bool channels_last = true, nchw = false, expanded_g = false, sums_u = true;
  double tau = 1.0, poison = 0.0;  // poison: put into one y of the second row

  int out_size(int d) const {
    return (in_size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  int rows() const { return batch * out_size(0) * out_size(1); }
  int all_neurons() const { return groups * neurons; }
  int all_channels() const { return groups * channels; }
  int columns() const { return channels * kernel[0] * kernel[1]; }
  bool pointwise() const { return in_size[0] * in_size[1] == 1; }
};

template <class T>
class DualWgradCase {
 public:
  DualWgradCase(const Layer& layer, Precision precision, int tile_rows)
      : l(layer),
        precision_(precision),
        pixel_(l.step ? l.step : apart(l.all_channels())),
        row_(apart(l.all_neurons())) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto fill = [&](std::vector<T>& numbers, size_t size) {
      numbers.resize(size);
      for (auto& number : numbers) number = from_float<T>(normal(random));
    };
    const int beyond = l.step ? l.all_channels() - l.step : 0;
    fill(x_, size_t(l.batch) * l.in_size[0] * l.in_size[1] * pixel_ + beyond);
    fill(y_, size_t(l.rows()) * row_);
    fill(g_, l.expanded_g ? 1 : y_.size());
    if (l.poison != 0) y_[y_at(1, 1)] = from_float<T>(l.poison);
    find_statistics();
    const int64_t weights = int64_t(l.all_neurons()) * l.columns();
    G_.assign(l.splits * weights, NAN), H0_ = G_;
    u_sums_.assign(l.splits * l.all_neurons(), NAN);
    const int blocks = (l.rows() + tile_rows - 1) / tile_rows;
    rows_per_split_ = (l.share ? l.share : (blocks + l.splits - 1) / l.splits) * tile_rows;
  }

  size_t x_bytes() const { return x_.size() * sizeof(T); }
  size_t signal_bytes() const { return y_.size() * sizeof(T); }

  DualWgradParams params() {
    DualWgradParams p{};
    const int64_t height = l.in_size[0], width = l.in_size[1], pixels = height * width;
    p.x = l.nchw ? Images{x_.data(), pixel_ * pixels, pixels, width, 1}
                 : Images{x_.data(), pixel_ * pixels, 1, pixel_ * width, pixel_};
    if (height == 1) p.x.height = 1;  // as PyTorch's views of a matrix have it
    if (width == 1) p.x.width = 1;
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
    p.G = G_.data(), p.H0 = H0_.data(), p.u_sums = l.sums_u ? u_sums_.data() : nullptr;
    p.splits = l.splits, p.rows_per_split = rows_per_split_, p.channels_last = l.channels_last;
    return p;
  }

  // What the kernel has put where `params` said, with the loops.
  void compare() const {
    const int taps = l.kernel[0] * l.kernel[1], rows = l.rows();
    // Of the sum of magnitudes: what the numbers of the dtype lose, and u when it is rounded.
    const double product = sizeof(T) == 2 ? 1e-6 : precision_ == Precision::tf32 ? 2e-3 : 4e-7;
    const double rounding = sizeof(T) == 4 ? product : std::is_same_v<T, float16> ? 1e-3 : 5e-3;
    std::vector<double> of_u(rows), of_g(rows);
    for (int k = 0; k < l.all_neurons(); ++k) {
      double u_sum = 0, size = 0;
      for (int row = 0; row < rows; ++row) {
        of_u[row] = u(row, k), of_g[row] = g(row, k);
        u_sum += of_u[row], size += std::abs(of_u[row]);
      }
      if (l.sums_u)
        check::near(l.name, "u_sums", k, over_splits(u_sums_, k), u_sum, (rounding + 1e-5) * size);
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
        check::near(l.name, "G", at, over_splits(G_, at), G, product * G_size);
        check::near(l.name, "H0", at, over_splits(H0_, at), H0, (rounding + 2e-6) * H0_size);
      }
    }
  }

 private:
  int64_t apart(int64_t numbers) const {
    return l.spare ? (numbers + l.spare + 7) / 8 * 8 : numbers;
  }

  // Neurons side by side, or, as from NCHW images of one position, rows side by side.
  Matrix matrix(const std::vector<T>& t) const {
    return l.nchw ? Matrix{t.data(), 1, l.rows()} : Matrix{t.data(), row_, 1};
  }
  size_t y_at(int row, int neuron) const {
    return l.nchw ? size_t(neuron) * l.rows() + row : size_t(row) * row_ + neuron;
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
    const int c = group * l.channels + channel;
    const size_t at = l.nchw ? ((size_t(image) * pixel_ + c) * l.in_size[0] + h) * l.in_size[1] + w
                             : ((size_t(image) * l.in_size[0] + h) * l.in_size[1] + w) * pixel_ + c;
    return to_float(x_[at]);
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
    if (l.competition == Competition::linear) return y(row, k);
    const bool wins = winner_[row] == k;
    const double inverse = exact_inverse_[row];
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

  const Layer l;
  const Precision precision_;
  const int64_t pixel_, row_;  // numbers from one pixel of x, or one row of y, to the next
  int rows_per_split_;
  std::vector<T> x_, y_, g_;
  std::vector<float> largest_, inverse_, G_, H0_, u_sums_;
  std::vector<double> exact_inverse_;
  std::vector<int32_t> winner_;
};

}  // namespace ghl::cuda
