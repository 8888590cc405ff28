// Vectors of this translation unit's instruction set, element conversions, and exp of a vector.
//
// Everything is in an anonymous namespace: the same source is compiled for several instruction
// sets, and the linker must never let one serve for another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define GHL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define GHL_VECTOR_BYTES 32
#else
#define GHL_VECTOR_BYTES 16
#endif

namespace ghl::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
  explicit operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
};
using Float16 = _Float16;

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(GHL_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(GHL_VECTOR_BYTES)));
  typedef int32_t lanes __attribute__((vector_size(GHL_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(GHL_VECTOR_BYTES)));
  typedef int64_t lanes __attribute__((vector_size(GHL_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using Lanes = typename VectorOf<T>::lanes;
template <class T>
constexpr int64_t kLanes = GHL_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

inline int64_t minimum(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return divide_up(a, b) * b;
}

template <class T>
inline T sum_of_lanes(Vector<T> v) {
  T sum = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// NaN wins over every number, from either side.
template <class T>
inline T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

template <class T>
inline Vector<T> larger_of_lanes(Vector<T> a, Vector<T> b) {
  return ((b > a) | (b != b)) ? b : a;
}

// f(offset, elements) for each vector of count elements; the last may have fewer than its lanes.
template <class T, class F>
inline void for_each_vector(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) f(i, kLanes<T>);
  if (i < count) f(i, count - i);
}

template <class T>
inline Vector<T> load_some(const T* p, int64_t count) {
  if (count == kLanes<T>) return load(p);
  Vector<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class T>
inline void store_some(T* p, Vector<T> v, int64_t count) {
  if (count == kLanes<T>) return store(p, v);
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// exp for x <= 0 to about 1 ulp: 2^n e^r with |r| <= ln(2)/2 and a degree-6 polynomial for e^r.
// Results below the smallest normal number are 0. NaN stays NaN.
inline Vector<float> exp_nonpositive(Vector<float> x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: the low bits of the sum are n
  const Vector<float> shifted = x * 1.44269504088896341f + to_integer;
  const Vector<float> n = shifted - to_integer;
  const Vector<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  VectorOf<float>::bits exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + 0x3f800000;
  Vector<float> power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < -87.0f ? Vector<float>{} : p * power;
}

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace
}  // namespace ghl::cpu
