// The launcher of sm90_dual_wgrad.h: tensor maps, and the kernel for a dtype, tile and competition.
#include <atomic>

#include "launch.h"
#include "sm90_dual_wgrad.h"
#include "sm90_maps.h"

namespace ghl::cuda {
namespace sm90 {
namespace {

// The driver's own functions, found at run time: the library does not link libcuda.
template <class Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<Function>(function);
}

CUtensorMapDataType type_of(Dtype dtype) {
  return dtype == Dtype::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

cudaError_t encode(TensorMap& map, const MapOfMatrix& of, Dtype dtype) {
  static const auto tiled =
      driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (!tiled) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {of.sizes[0], of.sizes[1]}, strides[1] = {of.strides[0]};
  const cuuint32_t box[2] = {kBox, kRows}, steps[2] = {1, 1};
  const CUresult result =
      tiled(&map, type_of(dtype), 2, const_cast<void*>(of.data), sizes, strides, box, steps,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t encode(TensorMap& map, const MapOfImages& of, Dtype dtype) {
  static const auto im2col =
      driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (!im2col) return cudaErrorNotSupported;
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = of.sizes[i];
  for (int i = 0; i < 3; ++i) strides[i] = of.strides[i];
  const CUresult result = im2col(
      &map, type_of(dtype), 4, const_cast<void*>(of.data), sizes, strides, of.lower, of.upper, kBox,
      kRows, of.steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// That the kernel is there, with a body, and may have its memory.
template <class Kernel>
cudaError_t prepare(Kernel kernel, int registers, int shared_bytes, int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (major != 9 || minor != 0) return cudaErrorNoKernelImageForDevice;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  // compiled for sm_90 without its own instructions, the kernel is empty; and with fewer registers
  // there would not be those that its warps take
  if (attributes.numRegs != registers) return cudaErrorNoKernelImageForDevice;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
}

template <class T, class Shape, Competition COMPETITION>
cudaError_t launch(const DualWgradArguments& a, cudaStream_t stream) {
  static std::atomic<uint64_t> prepared{0};  // a bit for each of the first 64 devices
  constexpr int shared_bytes = sizeof(typename Shape::Shared);
  const auto kernel = dual_wgrad_kernel<T, Shape, COMPETITION>;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && !(prepared.load() & bit)) {
    error = prepare(kernel, Shape::REGISTERS, shared_bytes, device);
    if (error == cudaSuccess) prepared.fetch_or(bit);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  if (Shape::EXCHANGES) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {Shape::CLUSTER, 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(a.schedule.blocks_of_threads()) * Shape::CLUSTER);
  config.blockDim = dim3(Shape::THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute, config.numAttrs = Shape::EXCHANGES || Shape::CLUSTER > 1;
  return cudaLaunchKernelEx(&config, kernel, a);
}

template <class T, class Shape>
cudaError_t launch_competition(const DualWgradArguments& a, cudaStream_t stream) {
  if constexpr (Shape::EXCHANGES) {
    return launch<T, Shape, Competition::softmax>(a, stream);
  } else {
    switch (a.p.competition) {
      case Competition::softmax: return launch<T, Shape, Competition::softmax>(a, stream);
      case Competition::linear: return launch<T, Shape, Competition::linear>(a, stream);
      case Competition::hard: return launch<T, Shape, Competition::hard>(a, stream);
      case Competition::softhebb: return launch<T, Shape, Competition::softhebb>(a, stream);
    }
    return cudaErrorInvalidValue;
  }
}

template <class Shape>
cudaError_t launch_shape(const DualWgradParams& p, cudaStream_t stream) {
  DualWgradArguments a{};
  a.p = p;
  a.geometry = geometry(p, Shape::COLUMN_BOXES, Shape::CLUSTER);
  a.schedule = schedule(p, a.geometry);
  a.x_is_matrix = row_stride_of_x(p) != 0;
  cudaError_t error =
      a.x_is_matrix ? encode(a.x, map_of_rows(p), p.dtype) : encode(a.x, map_of_images(p), p.dtype);
  MapOfMatrix y = map_of_signal(p.y, p);
  if (p.exchange) {
    const ExchangeLayout layout(p.neurons, p.splits, p.rows_per_split);
    a.exchange = layout.in(p.exchange);
    y = map_of_exchange(p, a.exchange);
    if (error == cudaSuccess)
      error = cudaMemsetAsync(a.exchange.arrivals, 0, layout.arrivals_bytes, stream);
  }
  if (error == cudaSuccess) error = encode(a.y, y, p.dtype);
  if (error == cudaSuccess) error = encode(a.g, map_of_signal(p.g, p), p.dtype);
  if (error != cudaSuccess) return error;
  return p.dtype == Dtype::float16 ? launch_competition<float16, Shape>(a, stream)
                                   : launch_competition<bfloat16, Shape>(a, stream);
}

template <class Of>
constexpr Tile tile_of() {
  constexpr int bytes = sizeof(typename Of::Shared);
  return {kRows, kNeurons, Of::COLUMNS, Of::THREADS, Of::STAGES, bytes, Of::CLUSTER, Of::EXCHANGES};
}

}  // namespace
}  // namespace sm90

Tile sm90_dual_wgrad_tile(int number) {
  constexpr Tile tiles[kSm90DualWgradTiles] = {
      sm90::tile_of<sm90::Shape<2, 1>>(),      sm90::tile_of<sm90::Shape<3, 1>>(),
      sm90::tile_of<sm90::Shape<4, 1>>(),      sm90::tile_of<sm90::Shape<3, 2>>(),
      sm90::tile_of<sm90::Shape<4, 2>>(),      sm90::tile_of<sm90::Shape<2, 1, true>>(),
      sm90::tile_of<sm90::Shape<3, 1, true>>()};
  return tiles[number];
}

const char* sm90_dual_wgrad_unfit(const DualWgradParams& p) {
  return sm90::unfit(p);
}

bool sm90_dual_wgrad_covers(const DualWgradParams& p, int tile) {
  const Tile of = sm90_dual_wgrad_tile(tile);
  const auto s = sm90::schedule(p, sm90::geometry(p, of.columns / sm90::kBox, of.cluster));
  return s.tiles > 0 && !(of.exchanges && s.strung);
}

int64_t sm90_exchange_bytes(int32_t neurons, int32_t splits, int32_t rows_per_split) {
  return sm90::ExchangeLayout(neurons, splits, rows_per_split).bytes();
}

cudaError_t launch_sm90_dual_wgrad(const DualWgradParams& p, int tile, cudaStream_t stream) {
  const Tile of = sm90_dual_wgrad_tile(tile);
  const bool given = p.statistics.largest || p.competition == Competition::linear;
  if (sm90::unfit(p) || !sm90_dual_wgrad_covers(p, tile) || (of.cluster > 1 && !given) ||
      of.exchanges != (p.exchange != nullptr))
    return cudaErrorInvalidValue;
  switch (tile) {
    case 0: return sm90::launch_shape<sm90::Shape<2, 1>>(p, stream);
    case 1: return sm90::launch_shape<sm90::Shape<3, 1>>(p, stream);
    case 2: return sm90::launch_shape<sm90::Shape<4, 1>>(p, stream);
    case 3: return sm90::launch_shape<sm90::Shape<3, 2>>(p, stream);
    case 4: return sm90::launch_shape<sm90::Shape<4, 2>>(p, stream);
    case 5: return sm90::launch_shape<sm90::Shape<2, 1, true>>(p, stream);
    default: return sm90::launch_shape<sm90::Shape<3, 1, true>>(p, stream);
  }
}

}  // namespace ghl::cuda
