// sm90_dual_wgrad.h against a loop in double precision, run on the host by sm90_emulation.h; or on
// a GPU, see sm90_on_gpu.cu.
//
// Arguments: the numbers of the layers to test, all by default.
#include <algorithm>
#include <string>

#include "../../csrc/cuda/sm90_dual_wgrad.h"
#include "../../csrc/cuda/sm90_maps.h"
#include "dual_wgrad_layer.h"
#include "sm90_layers.h"
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
