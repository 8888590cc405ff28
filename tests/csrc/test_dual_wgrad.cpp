// dual_wgrad.h against a loop in double precision, on shapes that reach every branch.
//
// Arguments: the dtypes to test (bfloat16 float16 tf32 tf32x3), all by default.
#include <algorithm>
#include <set>
#include <string>

#include "../../csrc/cuda/dual_wgrad.h"
#include "dual_wgrad_layer.h"

namespace ghl::cuda {
namespace {

template <class Shape>
void run(const Layer& layer) {
  DualWgradCase<typename Shape::Number> one(layer, Shape::PRECISION, Shape::ROWS);
  const DualWgradArguments arguments = dual_wgrad_arguments(one.params(), Shape::COLUMNS);
  const Tile tile = Shape::tile();
  emulation::launch(dual_wgrad_grid(arguments, tile), tile.threads, tile.shared_bytes,
                    [&] { dual_wgrad_kernel<Shape>(arguments); });
  one.compare();
}

template <class T, Precision P>
void run(const Layer& layer) {
  if (layer.tile == 0)
    return layer.pointwise() ? run<CompiledShape<T, P, true, 0>>(layer)
                             : run<CompiledShape<T, P, false, 0>>(layer);
  if constexpr (P == Precision::tf32)
    if (layer.tile == 1)
      return layer.pointwise() ? run<CompiledShape<T, P, true, 1>>(layer)
                               : run<CompiledShape<T, P, false, 1>>(layer);
  if constexpr (sizeof(T) == 2)
    if (layer.tile == 2) run<CompiledShape<T, P, true, 2>>(layer);
}

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
      {.name = "few channels folded, pixels that overlap",
       .batch = 2,
       .groups = 1,
       .neurons = 24,
       .channels = 48,
       .in_size = {9, 6},
       .kernel = {4, 1},
       .splits = 2,
       .step = 16},
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

// What differs from dtype to dtype is few lines: of the second of a size, every third layer.
template <class T, Precision P>
void test(int every) {
  int number = 0;
  for (const Layer& layer : layers())
    if (number++ % every == 0) run<T, P>(layer);
}

// What can be copied 16 bytes at a time is: number by number a layer takes ten times as long.
void test_wide_copies() {
  const Layer dense[] = {
      {.name = "wide linear", .batch = 3, .groups = 1, .neurons = 24, .channels = 16},
      {.name = "wide image",
       .batch = 1,
       .groups = 2,
       .neurons = 8,
       .channels = 8,
       .in_size = {3, 4},
       .kernel = {3, 3},
       .padding = {1, 1}},
  };
  for (const Layer& layer : dense) {
    DualWgradCase<bfloat16> one(layer, Precision::tf32, 32);
    const DualWgradArguments a = dual_wgrad_arguments(one.params(), 64);
    check::near(layer.name, "wide", 0, a.wide_x && a.wide_y && a.wide_g, true, 0);
  }
}

// Threads side by side copy chunks side by side; eight of them read 16 bytes of the table at once.
template <class Shape>
void test_table() {
  constexpr int chunks = Shape::COLUMNS / Shape::VECTOR;
  std::set<int> slots;
  for (int column = 0; column < Shape::COLUMNS; ++column) slots.insert(Shape::slot(column));
  check::near("table", "slots", 0, slots.size(), Shape::COLUMNS, 0);
  check::near("table", "the last slot", 0, *slots.rbegin(), Shape::COLUMNS - 1, 0);
  for (int first = 0; first < chunks; first += 8) {
    std::set<int> banks;
    for (int i = 0; i < 8; ++i) banks.insert(Shape::slot((first + i) * Shape::VECTOR) % 8);
    check::near("table", "banks", first, banks.size(), 8, 0);
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
  test_wide_copies();
  test_table<CompiledShape<bfloat16, Precision::tf32, false, 0>>();
  test_table<CompiledShape<bfloat16, Precision::tf32, false, 1>>();
  test_table<CompiledShape<float, Precision::tf32, true, 1>>();
  const auto asked = [&](const std::string& name) {
    return count < 2 || std::find(names + 1, names + count, name) != names + count;
  };
  if (asked("bfloat16")) test<bfloat16, Precision::tf32>(1);
  if (asked("float16")) test<float16, Precision::tf32>(3);
  if (asked("tf32")) test<float, Precision::tf32>(3);
  if (asked("tf32x3")) test<float, Precision::tf32x3>(1);
  return check::result();
}
