// Times sm90_dual_wgrad.cu alone, without Python, on layers of ResNet-50 at batch 256 in bf16:
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a bench/sm90_dual_wgrad.cu
// Of each layer and tile, with u, its statistics or nothing given, or u exchanged: milliseconds
// (the median of 20 launches after 5; only layers whose inputs fit in the L2 cache read them from
// there), TFLOP/s, and GB/s of x, y and g read once.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "../csrc/cuda/sm90_dual_wgrad.cu"

namespace {

using namespace ghl::cuda;
using ghl::Competition;

struct Layer {
  const char* name;
  int neurons, channels, in_size, kernel, stride;
};
constexpr int kBatch = 256;
constexpr Layer kLayers[] = {{"1x1 64 to 64, 56", 64, 64, 56, 1, 1},
                             {"1x1 64 to 256, 56", 256, 64, 56, 1, 1},
                             {"1x1 256 to 64, 56", 64, 256, 56, 1, 1},
                             {"1x1 512 to 128, 28", 128, 512, 28, 1, 1},
                             {"1x1 128 to 512, 28", 512, 128, 28, 1, 1},
                             {"1x1 256 to 1024, 14", 1024, 256, 14, 1, 1},
                             {"1x1 1024 to 256, 14", 256, 1024, 14, 1, 1},
                             {"1x1 256 to 512, 56/2", 512, 256, 56, 1, 2},
                             {"3x3 64, 56", 64, 64, 56, 3, 1},
                             {"3x3 128, 28", 128, 128, 28, 3, 1},
                             {"3x3 256, 14", 256, 256, 14, 3, 1},
                             {"3x3 512, 7", 512, 512, 7, 3, 1},
                             {"3x3 512, 14/2", 512, 512, 14, 3, 2}};

__global__ void fill(__nv_bfloat16* to, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x)
    to[i] = __float2bfloat16(int((i * 2654435761u) >> 8 & 0xffff) / 16384.0f - 2.0f);
}

template <class T>
T* allocate(size_t count) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, count * sizeof(T)) != cudaSuccess) std::abort();
  return static_cast<T*>(memory);
}

__nv_bfloat16* numbers(size_t count) {
  auto* to = allocate<__nv_bfloat16>(count);
  fill<<<1024, 256>>>(to, count);
  return to;
}

float milliseconds(const DualWgradParams& p, int tile) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  std::vector<float> times;
  for (int run = 0; run < 25; ++run) {
    cudaEventRecord(begin);
    const cudaError_t error = launch_sm90_dual_wgrad(p, tile, nullptr);
    cudaEventRecord(end);
    if (error != cudaSuccess || cudaEventSynchronize(end) != cudaSuccess) {
      std::printf("%s\n", cudaGetErrorString(error ? error : cudaGetLastError()));
      std::exit(1);
    }
    float time = 0;
    cudaEventElapsedTime(&time, begin, end);
    if (run >= 5) times.push_back(time);
  }
  std::nth_element(times.begin(), times.begin() + 10, times.end());
  return times[10];
}

// How the rows are shared out, as ghl_kernels/splits.py does; the clusters that all tiles have.
int share_out(DualWgradParams& p, const Tile& tile, int processors, bool exchanges) {
  const auto of = sm90::geometry(p, tile.columns / 64, tile.cluster);
  const int tiles = of.neuron_tiles * of.column_tiles, at_once = processors / tile.cluster;
  const int blocks = (p.rows + 63) / 64,
            splits = std::max(1, std::min(at_once / tiles, blocks / 4));
  const int share = (blocks + splits - 1) / splits;
  const int strung = std::max(4, (tiles * blocks + at_once - 1) / at_once);
  p.rows_per_split = share * 64, p.splits = (blocks + share - 1) / share;
  const int rounds = (tiles * p.splits + at_once - 1) / at_once;
  if (!exchanges && blocks / strung && blocks % strung && rounds * share > 1.08 * strung)
    p.rows_per_split = strung * 64, p.splits = blocks / strung + 2;
  return tiles;
}

struct Signal {
  const char* name;
  Competition competition;
  bool in_tile, exchanges;
};
constexpr Signal kSignals[] = {{"u given", Competition::linear, false, false},
                               {"statistics", Competition::softmax, false, false},
                               {"in tile", Competition::softmax, true, false},
                               {"exchanged", Competition::softmax, false, true}};

void time_layer(const Layer& l, int processors) {
  DualWgradParams p{};
  const int out = (l.in_size - 1) / l.stride + 1, taps = l.kernel * l.kernel;
  p.rows = kBatch * out * out, p.groups = 1, p.neurons = l.neurons, p.channels = l.channels;
  const size_t x_count = size_t(kBatch) * l.in_size * l.in_size * l.channels;
  const size_t y_count = size_t(p.rows) * l.neurons;
  p.x = {numbers(x_count), int64_t(l.in_size) * l.in_size * l.channels, 1,
         int64_t(l.in_size) * l.channels, l.channels};
  p.y = {numbers(y_count), l.neurons, 1}, p.g = {numbers(y_count), l.neurons, 1};
  p.dtype = Dtype::bfloat16, p.competition = Competition::softmax, p.scale = 1.4427f;
  p.in_height = p.in_width = l.in_size, p.out_height = p.out_width = out;
  p.kernel_h = p.kernel_w = l.kernel, p.stride_h = p.stride_w = l.stride;
  p.padding_h = p.padding_w = l.kernel / 2, p.dilation_h = p.dilation_w = 1;
  p.channels_last = true;
  // any finite statistics do for the time
  auto* statistics = allocate<float>(2 * size_t(p.rows));
  cudaMemset(statistics, 0, 8 * size_t(p.rows));
  for (int tile = 0; tile < kSm90DualWgradTiles; ++tile) {
    const Tile of = sm90_dual_wgrad_tile(tile);
    if (of.cluster > (l.neurons + 63) / 64) continue;
    for (const Signal& signal : kSignals) {
      if (signal.exchanges != of.exchanges) continue;
      const int clusters = share_out(p, of, processors, signal.exchanges);
      if (signal.in_tile && (l.neurons > 64 || of.cluster > 1)) continue;
      if (signal.exchanges && clusters > processors) continue;
      const size_t sums = size_t(p.splits) * l.neurons * l.channels * taps;
      p.G = allocate<float>(sums), p.H0 = allocate<float>(sums);
      p.exchange = signal.exchanges
                       ? allocate<char>(sm90_exchange_bytes(p.neurons, p.splits, p.rows_per_split))
                       : nullptr;
      p.competition = signal.competition;
      p.statistics = {signal.in_tile ? nullptr : statistics, statistics + p.rows, nullptr};
      const double ms = milliseconds(p, tile);
      std::printf(
          "%-22s tile %d, %3d clusters x %2d splits, %-10s: %7.4f ms %6.1f TFLOP/s %6.0f GB/s\n",
          l.name, tile, clusters, p.splits, signal.name, ms,
          4e-9 * p.rows * l.neurons * l.channels * taps / ms,
          2e-6 * (x_count + 2.0 * y_count) / ms);
      cudaFree(p.G), cudaFree(p.H0), cudaFree(p.exchange);
    }
  }
  for (const void* memory : {p.x.data, p.y.data, p.g.data}) cudaFree(const_cast<void*>(memory));
  cudaFree(statistics);
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return 1;
  std::printf("%s\n", properties.name);
  for (const Layer& layer : kLayers) time_layer(layer, properties.multiProcessorCount);
}
