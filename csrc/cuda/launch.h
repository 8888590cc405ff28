// What the kernels' files offer to the seam and to programs without Python: checked nothing,
// launched on the stream, never waited for. All return the first error of the CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace ghl::cuda {

// logsumexp.cu: the statistics of each row of y, or its log-sum-exp.
cudaError_t launch_statistics(const StatisticsParams&, cudaStream_t);

// split_k.cu: the sum of the splits' parts, in their order.
cudaError_t launch_sum_splits(const SumSplitsParams&, cudaStream_t);

// merge.cu: the updates of all layers in one cooperative launch (in several for very many layers),
// of one layer in two launches.
cudaError_t launch_merge(const MergeLayer* layers, int32_t count, Decay, Gate, Normalize,
                         cudaStream_t);

// dual_wgrad*.cu: mma.sync, for compute capability 8.0 and newer. Tiles are numbered from 0; what
// is not compiled for a dtype, precision or kind of layer has 0 rows.
constexpr int kDualWgradTiles = 3;
Tile dual_wgrad_tile(int number, Dtype, Precision, bool pointwise);
cudaError_t launch_dual_wgrad(const DualWgradParams&, int tile, cudaStream_t);

// sm90_dual_wgrad.cu: TMA and wgmma, for compute capability 9.0 only; 16-bit numbers. Tiles have 64
// neurons by 128, 192 and 256 columns, in boxes of one tap and up to 64 channels; then twice the
// neurons by 192 and 256, by two blocks in a cluster; then the first two with u exchanged.
constexpr int kSm90DualWgradTiles = 7;
Tile sm90_dual_wgrad_tile(int number);
// Why it cannot run a layer (alignment, strides, sizes), or null; asks nothing of the GPU.
const char* sm90_dual_wgrad_unfit(const DualWgradParams&);
// Whether the splits are enough for the rows, as sm90_schedule.h shares them out: each a part of
// its own or, if there are more of them, what is left of one tile strung together with the next.
bool sm90_dual_wgrad_covers(const DualWgradParams&, int tile);
cudaError_t launch_sm90_dual_wgrad(const DualWgradParams&, int tile, cudaStream_t);
// The bytes that DualWgradParams::exchange must have for tiles that exchange u. All their blocks
// must be on the GPU at once, and rests are not strung together.
int64_t sm90_exchange_bytes(int32_t neurons, int32_t splits, int32_t rows_per_split);

}  // namespace ghl::cuda
