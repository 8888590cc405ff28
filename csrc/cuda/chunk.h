// 16 bytes of numbers that lie side by side, read or written at once, as floats.
#pragma once

#include "device.h"

namespace ghl::cuda {

GHL_DEVICE uint4 chunk_at(const void* chunk) {
  return *static_cast<const uint4*>(chunk);
}

GHL_DEVICE void unpack_chunk(float (&numbers)[4], uint4 words, float) {
  numbers[0] = bits_to_float(words.x), numbers[1] = bits_to_float(words.y);
  numbers[2] = bits_to_float(words.z), numbers[3] = bits_to_float(words.w);
}

template <class T>
GHL_DEVICE void unpack_chunk(float (&numbers)[8], uint4 words, T type) {
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
  GHL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 both = unpack(pairs[i], type);
    numbers[2 * i] = both.x, numbers[2 * i + 1] = both.y;
  }
}

template <class T, int N>
GHL_DEVICE void load_chunk(float (&numbers)[N], const T* chunk) {
  unpack_chunk(numbers, chunk_at(chunk), T{});
}

GHL_DEVICE void store_chunk(void* chunk, const float (&numbers)[4]) {
  *static_cast<uint4*>(chunk) = {float_to_bits(numbers[0]), float_to_bits(numbers[1]),
                                 float_to_bits(numbers[2]), float_to_bits(numbers[3])};
}

}  // namespace ghl::cuda
