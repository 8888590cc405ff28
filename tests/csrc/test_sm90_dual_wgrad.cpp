// sm90_dual_wgrad.h against a loop in double precision, run on the host by sm90_emulation.h; or on
// a GPU, see sm90_on_gpu.cu.
//
// Arguments: the numbers of the layers to test, all by default.
#include <algorithm>
#include <string>

#include "../../csrc/cuda/sm90_dual_wgrad.h"
#include "../../csrc/cuda/sm90_maps.h"
#include "dual_wgrad_layer.h"
#include "sm90_on_gpu.h"

namespace ghl::cuda::sm90 {
namespace {

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

template <class T, class Shape>
void launch(const DualWgradArguments& a) {
  if constexpr (Shape::EXCHANGES) {
    dual_wgrad_kernel<T, Shape, Competition::softmax>(a);
  } else {
    switch (a.p.competition) {
      case Competition::softmax: return dual_wgrad_kernel<T, Shape, Competition::softmax>(a);
      case Competition::linear: return dual_wgrad_kernel<T, Shape, Competition::linear>(a);
      case Competition::hard: return dual_wgrad_kernel<T, Shape, Competition::hard>(a);
      case Competition::softhebb: return dual_wgrad_kernel<T, Shape, Competition::softhebb>(a);
    }
  }
}

template <class T, class Shape>
void emulate(const DualWgradParams& p) {
  DualWgradArguments a{};
  a.p = p;
  a.geometry = geometry(p, Shape::COLUMN_BOXES, Shape::CLUSTER);
  a.schedule = schedule(p, a.geometry);
  if (a.schedule.tiles == 0) emulated::fail("splits that do not cover the rows");
  a.x_is_matrix = row_stride_of_x(p) != 0;
  a.x = a.x_is_matrix ? map_of(map_of_rows(p)) : map_of(map_of_images(p));
  a.y = map_of(map_of_signal(p.y, p)), a.g = map_of(map_of_signal(p.g, p));
  const ExchangeLayout exchange(p.neurons, p.splits, p.rows_per_split);
  std::vector<uint4> memory(p.exchange ? exchange.bytes() / 16 + 1 : 0, {~0u, ~0u, ~0u, ~0u});
  if (p.exchange) {
    a.exchange = exchange.in(memory.data());
    std::fill_n(a.exchange.arrivals, exchange.arrivals_bytes / 4, 0);
    a.y = map_of(map_of_exchange(p, a.exchange));
  }
  const dim3 grid{unsigned(a.schedule.blocks_of_threads()) * Shape::CLUSTER, 1, 1};
  emulation::launch(
      grid, Shape::THREADS, sizeof(typename Shape::Shared), [&] { launch<T, Shape>(a); },
      p.exchange != nullptr, Shape::CLUSTER);
}

template <class T, class Shape>
void run(const Layer& layer) {
  DualWgradCase<T> one(layer, Precision::tf32, kRows);
  DualWgradParams p = one.params();
  static char somewhere;
  if (Shape::EXCHANGES) p.exchange = &somewhere, p.statistics = {};
  if (const char* why = unfit(p)) emulated::fail(why);
#ifdef GHL_ON_GPU
  const int tile = Shape::COLUMN_BOXES - 2 + 2 * (Shape::CLUSTER - 1) + 5 * Shape::EXCHANGES;
  const char* error = run_sm90_on_gpu(p, one.x_bytes(), one.signal_bytes(), tile);
  if (error) emulated::fail(error);
#else
  emulate<T, Shape>(p);
#endif
  one.compare();
}

constexpr auto hard = Competition::hard, linear = Competition::linear,
               softhebb = Competition::softhebb;

// Rows, neurons and columns that end within and beyond a tile; fewer blocks than stages and more;
// tiles whose rests are strung together. For tiles of two, three and four boxes, and in clusters.
const Layer of_two[] = {
    {.name = "linear, one row",
     .batch = 1,
     .groups = 1,
     .neurons = 8,
     .channels = 8,
     .in_tile = true},
    {.name = "linear, hard in the tile",
     .batch = 70,
     .groups = 1,
     .neurons = 40,
     .channels = 8,
     .competition = hard,
     .in_tile = true},
    {.name = "1x1, stride 2",
     .batch = 5,
     .groups = 1,
     .neurons = 72,
     .channels = 24,
     .in_size = {9, 10},
     .stride = {2, 2},
     .spare = 8},
    {.name = "1x1, groups",
     .batch = 3,
     .groups = 2,
     .neurons = 24,
     .channels = 16,
     .in_size = {5, 7}},
    {.name = "linear, u is y",
     .batch = 90,
     .groups = 1,
     .neurons = 72,
     .channels = 40,
     .competition = linear},
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
const Layer of_three[] = {
    {.name = "3x3, a tap a box",
     .batch = 2,
     .groups = 1,
     .neurons = 64,
     .channels = 64,
     .in_size = {7, 9},
     .kernel = {3, 3},
     .padding = {1, 1},
     .in_tile = true},
    {.name = "linear, NaN",
     .batch = 70,
     .groups = 1,
     .neurons = 16,
     .channels = 8,
     .in_tile = true,
     .poison = NAN},
    {.name = "linear, more tiles than one",
     .batch = 300,
     .groups = 1,
     .neurons = 136,
     .channels = 136,
     .splits = 2,
     .spare = 8,
     .tau = 2.0},
    {.name = "linear, hard",
     .batch = 90,
     .groups = 1,
     .neurons = 200,
     .channels = 8,
     .competition = hard},
    {.name = "3x3, groups of 64 channels",
     .batch = 2,
     .groups = 2,
     .neurons = 64,
     .channels = 64,
     .in_size = {4, 5},
     .kernel = {3, 3},
     .padding = {1, 1}},
    {.name = "3x3, groups of 8 channels",
     .batch = 2,
     .groups = 2,
     .neurons = 24,
     .channels = 8,
     .in_size = {6, 5},
     .kernel = {3, 3},
     .padding = {1, 1}},
    {.name = "3x3, groups, several tiles a block of threads",
     .batch = 5,
     .groups = 2,
     .neurons = 72,
     .channels = 64,
     .in_size = {6, 7},
     .kernel = {3, 3},
     .padding = {1, 1},
     .competition = softhebb,
     .splits = 2,
     .share = 9},
};
const Layer of_four[] = {
    {.name = "linear, 6 blocks, rows in the tile",
     .batch = 350,
     .groups = 1,
     .neurons = 64,
     .channels = 72,
     .in_tile = true,
     .tau = 0.25},
    {.name = "linear, softhebb in the tile",
     .batch = 70,
     .groups = 1,
     .neurons = 40,
     .channels = 8,
     .competition = softhebb,
     .in_tile = true},
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
    {.name = "few channels folded, pixels that overlap",
     .batch = 2,
     .groups = 1,
     .neurons = 24,
     .channels = 48,
     .in_size = {9, 6},
     .kernel = {4, 1},
     .splits = 2,
     .step = 16,
     .in_tile = true},
    {.name = "3x3, weight (channels, taps), odd channels, one block of rows",
     .batch = 2,
     .groups = 1,
     .neurons = 20,
     .channels = 11,
     .in_size = {6, 5},
     .kernel = {3, 3},
     .padding = {1, 1},
     .competition = softhebb,
     .spare = 2,
     .channels_last = false},
    {.name = "1x1, dense",
     .batch = 3,
     .groups = 1,
     .neurons = 136,
     .channels = 72,
     .in_size = {5, 7}},
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
    {.name = "linear, a part that nobody needs",
     .batch = 130,
     .groups = 1,
     .neurons = 24,
     .channels = 264,
     .splits = 4},
    {.name = "linear, no sums of u",
     .batch = 200,
     .groups = 1,
     .neurons = 64,
     .channels = 64,
     .in_tile = true,
     .sums_u = false},
    {.name = "linear, tiles strung together",
     .batch = 350,
     .groups = 1,
     .neurons = 136,
     .channels = 264,
     .splits = 4,
     .share = 4},
};

const Layer of_clusters_of_three[] = {
    {.name = "cluster: linear, the second block has no neurons",
     .batch = 70,
     .groups = 1,
     .neurons = 40,
     .channels = 8},
    {.name = "cluster: linear, strung together",
     .batch = 350,
     .groups = 1,
     .neurons = 200,
     .channels = 136,
     .splits = 4,
     .share = 4,
     .spare = 8},
    {.name = "cluster: 3x3, groups",
     .batch = 3,
     .groups = 2,
     .neurons = 72,
     .channels = 64,
     .in_size = {6, 7},
     .kernel = {3, 3},
     .padding = {1, 1},
     .competition = softhebb},
};
const Layer of_clusters_of_four[] = {
    {.name = "cluster: 3x2, strides, dilation",
     .batch = 3,
     .groups = 1,
     .neurons = 136,
     .channels = 72,
     .in_size = {19, 23},
     .kernel = {3, 2},
     .stride = {2, 3},
     .padding = {2, 1},
     .dilation = {1, 2},
     .competition = hard,
     .splits = 2,
     .channels_last = false},
    {.name = "cluster: linear, more blocks than stages, u is y",
     .batch = 640,
     .groups = 1,
     .neurons = 128,
     .channels = 256,
     .competition = linear,
     .splits = 2},
};

// Rows of one lane to 32, and of more than 256 neurons; more chunks than places; warps without a
// row in a chunk; a last chunk that is not full.
const Layer exchanged_by_two[] = {
    {.name = "exchange: linear, more chunks than places",
     .batch = 1700,
     .groups = 1,
     .neurons = 72,
     .channels = 40,
     .sums_u = false,
     .tau = 0.5},
    {.name = "exchange: linear, 8 neurons, one row",
     .batch = 1,
     .groups = 1,
     .neurons = 8,
     .channels = 8,
     .sums_u = false},
};
const Layer exchanged_by_three[] = {
    {.name = "exchange: 3x3, NaN",
     .batch = 7,
     .groups = 1,
     .neurons = 64,
     .channels = 64,
     .in_size = {9, 10},
     .kernel = {3, 3},
     .padding = {1, 1},
     .splits = 2,
     .spare = 8,
     .sums_u = false,
     .poison = NAN},
    {.name = "exchange: 1x1, rows of 520 neurons",
     .batch = 9,
     .groups = 1,
     .neurons = 520,
     .channels = 72,
     .in_size = {9, 9},
     .sums_u = false,
     .poison = INFINITY},
    {.name = "exchange: 1x1, stride 2, two chunks of two splits",
     .batch = 30,
     .groups = 1,
     .neurons = 256,
     .channels = 264,
     .in_size = {11, 12},
     .stride = {2, 2},
     .splits = 2,
     .sums_u = false},
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
  for (const Layer& layer : of_two)
    if (asked(layer)) run<T, Shape<2, 1>>(layer);
  for (const Layer& layer : of_three)
    if (asked(layer)) run<T, Shape<3, 1>>(layer);
  for (const Layer& layer : of_four)
    if (asked(layer)) run<T, Shape<4, 1>>(layer);
  for (const Layer& layer : of_clusters_of_three)
    if (asked(layer)) run<T, Shape<3, 2>>(layer);
  for (const Layer& layer : of_clusters_of_four)
    if (asked(layer)) run<T, Shape<4, 2>>(layer);
  for (const Layer& layer : exchanged_by_two)
    if (asked(layer)) run<T, Shape<2, 1, true>>(layer);
  for (const Layer& layer : exchanged_by_three)
    if (asked(layer)) run<T, Shape<3, 1, true>>(layer);
}

}  // namespace
}  // namespace ghl::cuda::sm90

int main(int count, char** numbers) {
  using namespace ghl::cuda;
  sm90::test<bfloat16>(count, numbers, 1);
  sm90::test<float16>(count, numbers, 4);
  return check::result();
}
