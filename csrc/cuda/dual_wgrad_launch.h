// The launches of one dtype's dual weight gradients; a .cu file for each dtype instantiates them,
// so that they compile side by side.
#pragma once

#include "dual_wgrad.h"
#include "launch.h"

namespace ghl::cuda {

template <class T, Precision PRECISION>
struct DualWgradLaunches {
  static Tile tile(int number, bool pointwise);
  static cudaError_t launch(const DualWgradParams& p, int number, cudaStream_t stream);
};

// `f` of the compiled shape that a tile's number names; `none` where there is no such shape.
template <class T, Precision PRECISION, class Result, class F>
Result with_shape(int number, bool pointwise, Result none, F&& f) {
  if (pointwise && number == 0) return f(CompiledShape<T, PRECISION, true, 0>{});
  if (!pointwise && number == 0) return f(CompiledShape<T, PRECISION, false, 0>{});
  if constexpr (PRECISION != Precision::tf32x3) {
    if (pointwise && number == 1) return f(CompiledShape<T, PRECISION, true, 1>{});
    if (!pointwise && number == 1) return f(CompiledShape<T, PRECISION, false, 1>{});
  }
  if constexpr (sizeof(T) == 2)
    if (pointwise && number == 2) return f(CompiledShape<T, PRECISION, true, 2>{});
  return none;
}

template <class T, Precision PRECISION>
Tile DualWgradLaunches<T, PRECISION>::tile(int number, bool pointwise) {
  return with_shape<T, PRECISION>(number, pointwise, Tile{},
                                  [](auto shape) { return shape.tile(); });
}

template <class T, Precision PRECISION>
cudaError_t DualWgradLaunches<T, PRECISION>::launch(const DualWgradParams& p, int number,
                                                    cudaStream_t stream) {
  const auto of_shape = [&](auto shape) {
    const Tile tile = shape.tile();
    const auto kernel = dual_wgrad_kernel<decltype(shape)>;
    const DualWgradArguments arguments = dual_wgrad_arguments(p, tile.columns);
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.shared_bytes);
    if (error != cudaSuccess) return error;
    const dim3 grid = dual_wgrad_grid(arguments, tile);
    kernel<<<grid, tile.threads, tile.shared_bytes, stream>>>(arguments);
    return cudaGetLastError();
  };
  return with_shape<T, PRECISION>(number, is_pointwise(p), cudaErrorInvalidValue, of_shape);
}

}  // namespace ghl::cuda
