// The thin layer between kernels and the machine: all that a host compiler cannot take is named
// here.
//
// With nvcc these are the GPU's own instructions; without, `emulation.h` runs them on the host by
// their documented meaning, so that tests execute the same kernels under sanitizers. Kernels of one
// architecture only (TMA, wgmma) have a layer of their own, `sm90.h`.
//
// Rules that keep both alike: no thread leaves a kernel before its last barrier; all shared memory
// is dynamic; warp operations are reached by all 32 lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef __CUDACC__
#include "emulation.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GHL_KERNEL __global__
#define GHL_DEVICE __device__ __forceinline__
#define GHL_HOST_DEVICE __host__ __device__ __forceinline__
#define GHL_UNROLL _Pragma("unroll")
#define GHL_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
// A struct of arguments that stays in constant memory, however it is indexed.
#define GHL_CONSTANT_ARGUMENT __grid_constant__ const

namespace ghl::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The dynamic shared memory of the block, aligned to 1024 bytes as 128-byte swizzles need it.
GHL_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char ghl_shared_memory[];
  return ghl_shared_memory;
}

GHL_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes from global to shared memory, behind the thread's back: the first `bytes` of them are
// read, the others are zeros.
GHL_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Ends the group of copies that this thread has begun since the last call.
GHL_DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most PENDING of this thread's groups are under way.
template <int PENDING>
GHL_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8×8 matrices of 16-bit numbers, transposed: lane 8i + r gives the address of row r of matrix
// i (16 bytes), and receives in r[i] the numbers (2·(lane % 4), 2·(lane % 4) + 1) of column lane
// / 4.
GHL_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, of a 16×16 and b 16×8 in fragments of PTX's m16n8k16.
GHL_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

GHL_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b, of a 16×8 and b 8×8 in TF32, in fragments of PTX's m16n8k8.
GHL_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// x rounded to TF32's 11 significant bits, as a float32's bits.
GHL_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

GHL_DEVICE float bits_to_float(uint32_t bits) {
  return __uint_as_float(bits);
}
GHL_DEVICE uint32_t float_to_bits(float x) {
  return __float_as_uint(x);
}

GHL_DEVICE float to_float(float x) {
  return x;
}
GHL_DEVICE float to_float(bfloat16 x) {
  return __bfloat162float(x);
}
GHL_DEVICE float to_float(float16 x) {
  return __half2float(x);
}

template <class T>
GHL_DEVICE T from_float(float x);
template <>
GHL_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GHL_DEVICE bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
GHL_DEVICE float16 from_float<float16>(float x) {
  return __float2half_rn(x);
}

// Two 16-bit numbers in one register, the first in its lower half.
GHL_DEVICE float2 unpack(uint32_t pair, bfloat16) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
GHL_DEVICE float2 unpack(uint32_t pair, float16) {
  const __half2 both = *reinterpret_cast<const __half2*>(&pair);
  return __half22float2(both);
}
GHL_DEVICE uint32_t pack(float first, float second, bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}
GHL_DEVICE uint32_t pack(float first, float second, float16) {
  const __half2 both = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A pointer that the compiler does not take apart, to add to its parts instead.
template <class T>
GHL_DEVICE T* as_it_is(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
// 16 bytes that nobody writes, and that are not asked for again.
GHL_DEVICE uint4 load_once(const void* global) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(global));
  return v;
}
GHL_DEVICE void store_global(void* global, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 2 to the x, within two units of the last place; results below 2^-126 are 0.
GHL_DEVICE float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The value, of 32-bit words, of the lane whose number differs in the bits of `mask`.
template <class T>
GHL_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  GHL_UNROLL
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
  memcpy(&value, words, sizeof(T));
  return value;
}

// Waits for all threads of all blocks; the kernel must be launched cooperatively.
GHL_DEVICE void synchronize_grid() {
  cooperative_groups::this_grid().sync();
}

}  // namespace ghl::cuda
#endif
