// One value of many threads', in an order that depends on nothing but their number.
//
// `combine` may be called with its arguments in either order; where the result must be the same on
// all threads, it must not depend on that order.
#pragma once

#include "device.h"

namespace ghl::cuda {

constexpr int kWarp = 32;

// Over neighbouring lanes, a power of two of them, whose result each of them gets.
template <class T, class Combine>
GHL_DEVICE T reduce_lanes(T value, int lanes, Combine combine) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}

// Over lane `slot` of each group of `slots` lanes of every warp: warps in their order, the result
// for all threads of that slot. Takes shared memory for warps × slots values.
template <class T, class Combine>
GHL_DEVICE T reduce_warps(T value, int slots, Combine combine) {
  T* shared = reinterpret_cast<T*>(shared_memory());
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // what the last call left has been read
  if (lane < slots) shared[warp * slots + lane] = value;
  __syncthreads();
  const int slot = lane % slots;
  value = shared[slot];
  for (int other = 1; other < int(blockDim.x) / kWarp; ++other)
    value = combine(value, shared[other * slots + slot]);
  return value;
}

template <class T, class Combine>
GHL_DEVICE T reduce_block(T value, Combine combine) {
  return reduce_warps(reduce_lanes(value, kWarp, combine), 1, combine);
}

}  // namespace ghl::cuda
