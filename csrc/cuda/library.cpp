// The seam of the CUDA library: tensors become the kernels' structs here, once, and nowhere else.
//
// Implements the CUDA side of the overloads declared in ghl_kernels/ops.py against LibTorch's
// stable ABI. Shapes and dtypes were checked in Python, which also allocates; what is checked here
// is what a wrong call from elsewhere would turn into a bad memory access. Nothing waits for the
// GPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <vector>

#include "../seam.h"
#include "launch.h"

namespace ghl::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

// The device of a call's tensors as the current one, and the stream that PyTorch has there.
class Device {
 public:
  explicit Device(const Tensor& first)
      : on_gpu_(first.is_cuda()), index_(first.get_device_index()), guard_(index_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check(cudaSetDevice(index_), "choosing the device");  // this library's runtime is its own
  }

  cudaStream_t stream() const { return stream_; }

  void same(const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cuda() == on_gpu_ && t.get_device_index() == index_,
                    "all tensors of a call must be on cuda:", index_);
  }

  // One error of the runtime as an exception; PyTorch must not meet it again.
  void check(cudaError_t error, const char* what) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      STD_TORCH_CHECK(false, "ghl_kernels: ", what, " on cuda:", index_,
                      " has no kernel image: the library was compiled for ", GHL_CUDA_ARCHITECTURES,
                      "; build it with TORCH_CUDA_ARCH_LIST of this GPU");
    }
    STD_TORCH_CHECK(false, "ghl_kernels: ", what, " on cuda:", index_,
                    " failed: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  }

 private:
  bool on_gpu_;
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16");
  }
}

int32_t narrow(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= INT32_MAX - (1 << 16), "a size is ", number,
                  ", must be below 2**31 - 2**16");
  return static_cast<int32_t>(number);
}

// log2(e) / tau: what (y - largest) is multiplied by to be an exponent of 2; finite in float32.
float exponent_scale(double tau) {
  return static_cast<float>(std::min(M_LOG2E / tau, double(FLT_MAX)));
}

// `t` holds at least `elements` numbers of `dtype` without a gap, on the device of the call.
template <class T>
T* dense(const Device& device, const Tensor& t, ScalarType dtype, int64_t elements) {
  device.same(t);
  STD_TORCH_CHECK(t.scalar_type() == dtype, "an output or sum has the wrong dtype");
  STD_TORCH_CHECK(is_gapless(t), "an output or sum has gaps");
  STD_TORCH_CHECK(t.numel() >= elements, "an output or sum has ", t.numel(), " elements, needs ",
                  elements);
  return static_cast<T*>(t.mutable_data_ptr());
}

float* floats(const Device& device, const Tensor& t, int64_t elements) {
  return dense<float>(device, t, ScalarType::Float, elements);
}

Matrix matrix(const Device& device, const Tensor& t, Dtype dtype, int64_t rows, int64_t columns) {
  device.same(t);
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                  "y and g must be matrices of ", rows, " rows and ", columns, " neurons");
  STD_TORCH_CHECK(dtype_of(t) == dtype, "x, y, g differ in dtype");
  return {t.const_data_ptr(), t.stride(0), t.stride(1)};
}

// Largest, inverse and, where the competition asks for it, winner of each row; all null if absent.
Statistics statistics_of(const Device& device, const MaybeTensor& largest,
                         const MaybeTensor& inverse, const MaybeTensor& winner, int64_t rows,
                         Competition competition) {
  Statistics s{};
  if (!largest) return s;
  STD_TORCH_CHECK(inverse, "inverse is absent, must come with largest");
  s.largest = floats(device, *largest, rows);
  s.inverse = floats(device, *inverse, rows);
  if (winner) s.winner = dense<int32_t>(device, *winner, ScalarType::Int, rows);
  STD_TORCH_CHECK(s.winner || competition == Competition::softmax, "winner is absent");
  for (const void* array :
       {static_cast<void*>(s.largest), static_cast<void*>(s.inverse), static_cast<void*>(s.winner)})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(array) % 16 == 0,
                    "statistics must begin at multiples of 16 bytes");
  return s;
}

// y (outer, neurons, inner, 1): rows of the outer and inner dimension.
StatisticsParams rows_of(const Device& device, const Tensor& y, double tau) {
  device.same(y);
  STD_TORCH_CHECK(y.dim() == 4 && y.size(3) == 1 && y.size(1) > 0,
                  "y must be (outer, neurons, inner, 1)");
  StatisticsParams p{};
  p.y = {y.const_data_ptr(), y.stride(0), y.stride(1)};
  p.dtype = dtype_of(y);
  p.inner = narrow(y.size(2));
  p.inner_stride = y.stride(2);
  p.rows = narrow(y.size(0) * y.size(2));
  p.neurons = narrow(y.size(1));
  p.scale = exponent_scale(tau);
  return p;
}

void logsumexp(Tensor y, Tensor lse, double tau) {
  const Device device(y);
  StatisticsParams p = rows_of(device, y, tau);
  p.competition = Competition::softmax;
  p.lse = floats(device, lse, p.rows);
  if (p.rows) device.check(launch_statistics(p, device.stream()), "logsumexp");
}

void statistics(Tensor y, Tensor largest, Tensor inverse, MaybeTensor winner, int64_t competition,
                double tau) {
  const Device device(y);
  StatisticsParams p = rows_of(device, y, tau);
  p.competition = static_cast<Competition>(competition);
  p.statistics = statistics_of(device, largest, inverse, winner, p.rows, p.competition);
  if (p.rows) device.check(launch_statistics(p, device.stream()), "statistics");
}

// The layer as `x` (N, channels * groups, H, W) and the geometry tell it; no pointers yet.
DualWgradParams layer_of(const Tensor& x, const Tensor& y, const Integers& kernel_size,
                         const Integers& stride, const Integers& padding, const Integers& dilation,
                         const Integers& out_size, int64_t groups) {
  for (const Integers* pair : {&kernel_size, &stride, &padding, &dilation, &out_size})
    STD_TORCH_CHECK(pair->size() == 2, "the geometry must be pairs of integers");
  STD_TORCH_CHECK(x.dim() == 4 && y.dim() == 2, "x must have 4 dimensions, y 2");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0 && y.size(1) % groups == 0,
                  "groups do not divide the channels and neurons");
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(kernel_size[d] > 0 && stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0 &&
                        out_size[d] > 0,
                    "the geometry has a number that is too small");
    const int64_t reach = (out_size[d] - 1) * stride[d] + dilation[d] * (kernel_size[d] - 1);
    STD_TORCH_CHECK(reach < x.size(d + 2) + 2 * padding[d], "the kernel reaches beyond x");
  }
  DualWgradParams p{};
  p.rows = narrow(x.size(0) * out_size[0] * out_size[1]);
  p.groups = narrow(groups);
  p.neurons = narrow(y.size(1) / groups);
  p.channels = narrow(x.size(1) / groups);
  p.in_height = narrow(x.size(2)), p.in_width = narrow(x.size(3));
  p.out_height = narrow(out_size[0]), p.out_width = narrow(out_size[1]);
  p.kernel_h = narrow(kernel_size[0]), p.kernel_w = narrow(kernel_size[1]);
  p.stride_h = narrow(stride[0]), p.stride_w = narrow(stride[1]);
  p.padding_h = narrow(padding[0]), p.padding_w = narrow(padding[1]);
  p.dilation_h = narrow(dilation[0]), p.dilation_w = narrow(dilation[1]);
  narrow(y.size(1) * p.channels * p.kernel_h * p.kernel_w);
  return p;
}

Tile tile_of(int64_t number, Dtype dtype, Precision precision, bool pointwise, bool sm90) {
  if (!sm90) {
    const bool known = number >= 0 && number < kDualWgradTiles;
    return known ? dual_wgrad_tile(int(number), dtype, precision, pointwise) : Tile{};
  }
#ifdef GHL_SM90
  const bool known = number >= 0 && number < kSm90DualWgradTiles && dtype != Dtype::float32;
  return known ? sm90_dual_wgrad_tile(int(number)) : Tile{};
#else
  return Tile{};
#endif
}

cudaError_t launch_pair(const DualWgradParams& p, int64_t tile, bool sm90, cudaStream_t stream) {
  if (!sm90) return launch_dual_wgrad(p, int(tile), stream);
#ifdef GHL_SM90
  const char* unfit = sm90_dual_wgrad_unfit(p);
  STD_TORCH_CHECK(!unfit, "cuda_sm90 cannot run this layer: ", unfit);
  return launch_sm90_dual_wgrad(p, int(tile), stream);
#else
  return cudaErrorNoKernelImageForDevice;
#endif
}

constexpr int32_t kMostBlocks = 65535;  // in the second and third dimension of a grid

// The splits cover the rows, in whole blocks of the tile.
void check_splits(const DualWgradParams& p, const Tile& tile, int64_t number, bool sm90) {
  STD_TORCH_CHECK(tile.rows > 0, "this tile is not compiled for the dtype and kind of layer");
  STD_TORCH_CHECK(p.splits <= kMostBlocks && p.groups <= kMostBlocks, "splits and groups are ",
                  p.splits, " and ", p.groups, ", must be at most ", kMostBlocks);
  STD_TORCH_CHECK(p.splits > 0 && p.rows_per_split > 0 && p.rows_per_split % tile.rows == 0,
                  "rows_per_split is ", p.rows_per_split, ", must be a multiple of ", tile.rows);
  const int64_t before_last = int64_t(p.splits - 1) * p.rows_per_split;
  bool covers = before_last < p.rows && p.rows <= before_last + p.rows_per_split;
#ifdef GHL_SM90
  if (sm90) covers = sm90_dual_wgrad_covers(p, int(number));
#endif
  STD_TORCH_CHECK(covers, p.splits, " splits of ", p.rows_per_split, " rows do not cover ", p.rows);
}

// The memory of an exchange.
void* exchange_of(const Device& device, const Tensor& t, const DualWgradParams& p) {
  int64_t bytes = 0;
#ifdef GHL_SM90
  bytes = sm90_exchange_bytes(p.neurons, p.splits, p.rows_per_split);
#endif
  void* memory = dense<void>(device, t, ScalarType::Byte, bytes);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0,
                  "an exchange must begin at a multiple of 16 bytes");
  return memory;
}

void pair(Tensor x, Tensor y, Tensor g, MaybeTensor largest, MaybeTensor inverse,
          MaybeTensor winner, Tensor G, Tensor H0, MaybeTensor u_sums, Integers kernel_size,
          Integers stride, Integers padding, Integers dilation, Integers out_size, int64_t groups,
          int64_t competition, double tau, bool channels_last, bool tf32, int64_t splits,
          int64_t rows_per_split, int64_t tile_number, bool sm90, MaybeTensor exchange) {
  const Device device(x);
  DualWgradParams p = layer_of(x, y, kernel_size, stride, padding, dilation, out_size, groups);
  if (p.rows == 0 || p.channels == 0) return;
  const int64_t neurons = int64_t(p.groups) * p.neurons;
  p.x = {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.stride(3)};
  p.dtype = dtype_of(x);
  p.y = matrix(device, y, p.dtype, p.rows, neurons);
  p.g = matrix(device, g, p.dtype, p.rows, neurons);
  p.precision = tf32 ? Precision::tf32 : Precision::tf32x3;
  p.competition = static_cast<Competition>(competition);
  p.scale = exponent_scale(tau);
  p.statistics = statistics_of(device, largest, inverse, winner, p.rows, p.competition);
  p.splits = narrow(splits);
  p.rows_per_split = narrow(rows_per_split);
  p.channels_last = channels_last;
  const Tile tile = tile_of(tile_number, p.dtype, p.precision, is_pointwise(p), sm90);
  STD_TORCH_CHECK(bool(exchange) == tile.exchanges, "this tile ",
                  exchange ? "exchanges nothing" : "needs memory to exchange u by");
  if (exchange) p.exchange = exchange_of(device, *exchange, p);
  check_splits(p, tile, tile_number, sm90);
  const bool whole_rows = p.groups == 1 && p.neurons <= tile.neurons && tile.cluster == 1;
  STD_TORCH_CHECK(largest || whole_rows || exchange || p.competition == Competition::linear,
                  "largest is absent, must be given where a tile does not hold whole rows of y");
  const int64_t weights = neurons * p.channels * p.kernel_h * p.kernel_w;
  p.G = floats(device, G, splits * weights);
  p.H0 = floats(device, H0, splits * weights);
  for (const float* sums : {p.G, p.H0})
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(sums) % 8 == 0, "G and H0 must begin at 8 bytes");
  p.u_sums = u_sums ? floats(device, *u_sums, splits * neurons) : nullptr;
  device.check(launch_pair(p, tile_number, sm90, device.stream()), "the dual weight gradient");
}

void sum_splits(Tensor G_parts, Tensor H0_parts, MaybeTensor u_parts, Tensor G, Tensor H0,
                MaybeTensor u_sums, int64_t splits) {
  const Device device(G_parts);
  STD_TORCH_CHECK(bool(u_parts) == bool(u_sums), "u_parts and u_sums come together or not at all");
  SumSplitsParams p{};
  p.splits = narrow(splits);
  p.weights = G.numel();
  p.G_parts = floats(device, G_parts, splits * p.weights);
  p.H0_parts = floats(device, H0_parts, splits * p.weights);
  p.G = floats(device, G, p.weights);
  p.H0 = floats(device, H0, p.weights);
  if (u_sums) {
    p.neurons = narrow(u_parts->numel() / std::max<int64_t>(splits, 1));
    p.u_parts = floats(device, *u_parts, splits * p.neurons);
    p.u_sums = floats(device, *u_sums, p.neurons);
  }
  if (p.weights) device.check(launch_sum_splits(p, device.stream()), "the sum of splits");
}

MergeLayer merge_layer(const Device& device, const Tensor& G, const Tensor& H0,
                       const Tensor& totals, const Tensor& w, const Tensor& update,
                       const Tensor& neurons, const Tensor& layer, const Tensor& scratch) {
  MergeLayer m{};
  m.out_channels = narrow(w.size(0));
  m.columns = narrow(w.numel() / std::max<int64_t>(w.size(0), 1));
  STD_TORCH_CHECK(w.numel() > 0, "a weight is empty");
  const int64_t weights = w.numel();
  m.G_dtype = dtype_of(G), m.H0_dtype = dtype_of(H0);
  m.w_dtype = dtype_of(w), m.totals_dtype = dtype_of(totals);
  m.update_dtype = dtype_of(update);
  m.G = dense<void>(device, G, G.scalar_type(), weights);
  m.H0 = dense<void>(device, H0, H0.scalar_type(), weights);
  m.w = dense<void>(device, w, w.scalar_type(), weights);
  m.totals = dense<void>(device, totals, totals.scalar_type(), m.out_channels + 1);
  m.update = dense<void>(device, update, update.scalar_type(), weights);
  m.neurons = floats(device, neurons, 3 * m.out_channels);
  m.layer = floats(device, layer, 3);
  m.scratch = floats(device, scratch, 2 * m.out_channels);
  return m;
}

void foreach_merge(std::vector<Tensor> G, std::vector<Tensor> H0, std::vector<Tensor> totals,
                   std::vector<Tensor> w, std::vector<Tensor> update, std::vector<Tensor> neurons,
                   std::vector<Tensor> layer, std::vector<Tensor> scratch, int64_t decay,
                   int64_t gate, int64_t normalize) {
  const size_t count = G.size();
  for (const auto* list : {&H0, &totals, &w, &update, &neurons, &layer, &scratch})
    STD_TORCH_CHECK(list->size() == count, "the lists differ in length");
  if (count == 0) return;
  const Device device(G[0]);
  std::vector<MergeLayer> layers;
  layers.reserve(count);
  for (size_t i = 0; i < count; ++i)
    layers.push_back(merge_layer(device, G[i], H0[i], totals[i], w[i], update[i], neurons[i],
                                 layer[i], scratch[i]));
  device.check(
      launch_merge(layers.data(), narrow(int64_t(count)), static_cast<Decay>(decay),
                   static_cast<Gate>(gate), static_cast<Normalize>(normalize), device.stream()),
      "the merge");
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("logsumexp.cuda", TORCH_BOX(&logsumexp));
  m.impl("statistics.cuda", TORCH_BOX(&statistics));
  m.impl("pair.cuda", TORCH_BOX(&pair));
  m.impl("sum_splits.cuda", TORCH_BOX(&sum_splits));
  m.impl("foreach_merge.cuda", TORCH_BOX(&foreach_merge));
}

}  // namespace
}  // namespace ghl::cuda

#ifndef GHL_DISPATCH_KEY
#define GHL_DISPATCH_KEY "CUDA"  // tests run the seam on the host
#endif
GHL_DESCRIBE_LIBRARY(GHL_DISPATCH_KEY, ghl::cuda::implement)

GHL_EXPORT const char* ghl_kernels_cuda_architectures() {
  return GHL_CUDA_ARCHITECTURES;
}

// The tile of that number as rows, neurons, columns, threads, stages, bytes of shared memory,
// blocks of a cluster, whether it exchanges u; no rows where it is not compiled for such a layer.
GHL_EXPORT void ghl_kernels_cuda_tile(int number, int dtype, bool tf32, bool pointwise, bool sm90,
                                      int* fields) {
  using namespace ghl::cuda;
  const Precision precision = tf32 ? Precision::tf32 : Precision::tf32x3;
  const Tile t = tile_of(number, static_cast<Dtype>(dtype), precision, pointwise, sm90);
  const int known[] = {t.rows,   t.neurons,      t.columns, t.threads,
                       t.stages, t.shared_bytes, t.cluster, t.exchanges};
  std::copy(std::begin(known), std::end(known), fields);
}

// The bytes of memory that blocks of threads exchange u by.
GHL_EXPORT int64_t ghl_kernels_cuda_exchange_bytes(int neurons, int splits, int rows_per_split) {
#ifdef GHL_SM90
  return ghl::cuda::sm90_exchange_bytes(neurons, splits, rows_per_split);
#else
  return 0;
#endif
}
