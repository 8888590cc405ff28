// 16 bytes of numbers that lie side by side, read at once, as floats.
#pragma once

#include "device.h"

namespace ghl::cuda {

GHL_DEVICE void load_chunk(float (&numbers)[4], const float* chunk) {
  const uint4 words = *reinterpret_cast<const uint4*>(chunk);
  numbers[0] = bits_to_float(words.x), numbers[1] = bits_to_float(words.y);
  numbers[2] = bits_to_float(words.z), numbers[3] = bits_to_float(words.w);
}

template <class T>
GHL_DEVICE void load_chunk(float (&numbers)[8], const T* chunk) {
  const uint4 words = *reinterpret_cast<const uint4*>(chunk);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  GHL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack(pairs[i], T{});
    numbers[2 * i] = both.x, numbers[2 * i + 1] = both.y;
  }
}

}  // namespace ghl::cuda
