// The launches of one dtype's and precision's dual weight gradients; a .cu file for each
// instantiates them, so that they compile side by side.
#pragma once

#include "dual_wgrad.h"
#include "launch.h"

namespace ghl::cuda {

template <class T, Precision PRECISION>
struct DualWgradLaunches {
  static Tile tile(int number, bool pointwise);
  static cudaError_t launch(const DualWgradParams& p, int number, cudaStream_t stream);
};

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
