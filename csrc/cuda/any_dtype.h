// Numbers of a tensor whose dtype is known only at run time, in two steps: read as they lie in
// memory, so that many reads are under way before the first is waited for, then made floats.
#pragma once

#include "chunk.h"
#include "params.h"

namespace ghl::cuda {

// WIDTH numbers side by side; those of 16 bits in the first half of the words.
template <int WIDTH>
struct Raw {
  uint32_t words[WIDTH];
};

// Whether four numbers can be read at once from every fourth on.
GHL_DEVICE bool is_wide(const void* data, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % (dtype == Dtype::float32 ? 16 : 8) == 0;
}

template <int WIDTH>
GHL_DEVICE Raw<WIDTH> load_raw(const void* data, Dtype dtype, int64_t at) {
  static_assert(WIDTH == 1 || WIDTH == 4);
  Raw<WIDTH> raw{};
  if constexpr (WIDTH == 1) {
    if (dtype == Dtype::float32)
      raw.words[0] = static_cast<const uint32_t*>(data)[at];
    else
      raw.words[0] = static_cast<const uint16_t*>(data)[at];
  } else if (dtype == Dtype::float32) {
    const uint4 four = static_cast<const uint4*>(data)[at / 4];
    raw.words[0] = four.x, raw.words[1] = four.y, raw.words[2] = four.z, raw.words[3] = four.w;
  } else {
    const uint2 two = static_cast<const uint2*>(data)[at / 4];
    raw.words[0] = two.x, raw.words[1] = two.y;
  }
  return raw;
}

template <int WIDTH, class T>
GHL_DEVICE void unpack_raw(float (&numbers)[WIDTH], const Raw<WIDTH>& raw, T type) {
  GHL_UNROLL
  for (int i = 0; i < (WIDTH + 1) / 2; ++i) {
    const float2 both = unpack(raw.words[i], type);
    numbers[2 * i] = both.x;
    if (2 * i + 1 < WIDTH) numbers[2 * i + 1] = both.y;
  }
}

template <int WIDTH>
GHL_DEVICE void to_floats(float (&numbers)[WIDTH], const Raw<WIDTH>& raw, Dtype dtype) {
  if (dtype == Dtype::bfloat16) return unpack_raw(numbers, raw, bfloat16{});
  if (dtype == Dtype::float16) return unpack_raw(numbers, raw, float16{});
  GHL_UNROLL
  for (int i = 0; i < WIDTH; ++i) numbers[i] = bits_to_float(raw.words[i]);
}

GHL_DEVICE float number_at(const void* data, Dtype dtype, int64_t at) {
  float number[1];
  to_floats(number, load_raw<1>(data, dtype, at), dtype);
  return number[0];
}

template <class T>
GHL_DEVICE void store_as(void* data, int64_t at, const float (&numbers)[1], T) {
  static_cast<T*>(data)[at] = from_float<T>(numbers[0]);
}
template <class T>
GHL_DEVICE void store_as(void* data, int64_t at, const float (&numbers)[4], T type) {
  static_cast<uint2*>(data)[at / 4] = {pack(numbers[0], numbers[1], type),
                                       pack(numbers[2], numbers[3], type)};
}
GHL_DEVICE void store_as(void* data, int64_t at, const float (&numbers)[4], float) {
  store_chunk(static_cast<float*>(data) + at, numbers);
}

template <int WIDTH>
GHL_DEVICE void store_floats(void* data, Dtype dtype, int64_t at, const float (&numbers)[WIDTH]) {
  if (dtype == Dtype::float32) return store_as(data, at, numbers, float{});
  if (dtype == Dtype::float16) return store_as(data, at, numbers, float16{});
  store_as(data, at, numbers, bfloat16{});
}

}  // namespace ghl::cuda
