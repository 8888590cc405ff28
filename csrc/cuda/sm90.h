// Hopper's own instructions (sm_90a): barriers in shared memory, the copy engine (TMA), warpgroup
// products (wgmma), registers that change hands, clusters of blocks.
//
// Each is named as in the PTX ISA, whose sections' numbers move. `sm90_emulation.h` runs the same
// names on the host by their documented meaning. Descriptors and addresses are arithmetic, in
// `sm90_layout.h`.
#pragma once

#include "device.h"

#ifndef __CUDACC__
#include "sm90_emulation.h"
#else

#include <cuda.h>

namespace ghl::cuda::sm90 {

using TensorMap = CUtensorMap;

// mbarrier. A phase ends when all `arrivals` have come and the bytes that were announced
// are there. Waiting for a parity returns once the phase of that parity has ended, so that waiting
// for parity 1 on a new barrier returns at once.
GHL_DEVICE void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes new barriers visible to the copy engine; other threads still need __syncthreads().
GHL_DEVICE void barriers_ready() {
  asm volatile(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;" ::
          : "memory");
}
GHL_DEVICE void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// The same at the barrier that lies there in the shared memory of the cluster's block `rank`.
// Orders nothing between blocks, as copies and products need it: with .release.cluster it waits for
// all memory of the GPU each time, which took as long as the products.
GHL_DEVICE void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Of all threads of a cluster; what any of them wrote before is seen by all.
GHL_DEVICE void synchronize_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// Arrives, and announces bytes that the copy engine will report.
GHL_DEVICE void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Whether a phase has ended; may wait for it a while.
GHL_DEVICE bool phase_ended(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(ended)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return ended;
}
// With GHL_WAIT_LIMIT, so many polls are a deadlock and end the kernel with an error: for the first
// runs of a change.
template <class Ready>
GHL_DEVICE void wait_until(const Ready& ready) {
#ifdef GHL_WAIT_LIMIT
  int polls = 0;
  while (!ready() && ++polls < GHL_WAIT_LIMIT) {
  }
  // an illegal store, because a trap makes ptxas serialise the products
  if (polls == GHL_WAIT_LIMIT) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ll), "r"(0));
#else
  while (!ready()) {
  }
#endif
}
GHL_DEVICE void barrier_wait(uint64_t* barrier, uint32_t parity) {
  wait_until([=] { return phase_ended(barrier, parity); });
}

// What this thread knows to be written to global memory is there for copies that others begin once
// they know of it from this thread.
GHL_DEVICE void global_written() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// Counts one; whoever reads the count knows what this thread did.
GHL_DEVICE void count_up(int32_t* counter) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
GHL_DEVICE int32_t counted(const int32_t* counter) {
  int32_t count;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}

// What this thread has written to shared memory is there for products and the copy engine.
GHL_DEVICE void shared_written() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

GHL_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor: a box of a matrix, innermost coordinate first; zeros outside it. An
// innermost coordinate that is no multiple of 16 bytes is an illegal instruction (seen on an H100).
// To the same place in all BLOCKS of the cluster, each of whose barriers there is told of the
// bytes.
template <int BLOCKS>
GHL_DEVICE void load_box(void* shared, const TensorMap* map, uint64_t* barrier, int32_t column,
                         int32_t row) {
  if (BLOCKS > 1)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row),
        "h"(uint16_t((1 << BLOCKS) - 1))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// The same in im2col mode ("Tensors", "im2col mode"): pixels from (n, h, w) on in the order of the
// bounding box, each moved by the offsets of a tap; zeros where that is outside the image or n
// beyond the last.
template <int BLOCKS>
GHL_DEVICE void load_patches(void* shared, const TensorMap* map, uint64_t* barrier, int32_t channel,
                             int32_t w, int32_t h, int32_t n, uint16_t tap_w, uint16_t tap_h) {
  if (BLOCKS > 1)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(w), "r"(h), "r"(n), "h"(tap_w),
        "h"(tap_h), "h"(uint16_t((1 << BLOCKS) - 1))
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
        "l"(map), "r"(shared_address(barrier)), "r"(channel), "r"(w), "r"(h), "r"(n), "h"(tap_w),
        "h"(tap_h)
        : "memory");
}

// wgmma ("Asynchronous Warpgroup Level Matrix Instructions"). Between a product and the wait that
// ends it, nobody may touch its registers.
GHL_DEVICE void products_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
GHL_DEVICE void products_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>
GHL_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing at run time: for the compiler the registers live, and change, until here.
template <int N>
GHL_DEVICE void hold(float (&registers)[N]) {
  GHL_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define GHL_SUMS_8(d, i)                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define GHL_SUMS_32(d, i) \
  GHL_SUMS_8(d, i), GHL_SUMS_8(d, i + 8), GHL_SUMS_8(d, i + 16), GHL_SUMS_8(d, i + 24)
#define GHL_SUMS_64(d) GHL_SUMS_32(d, 0), GHL_SUMS_32(d, 32)
#define GHL_SUMS_96(d) GHL_SUMS_64(d), GHL_SUMS_32(d, 64)
#define GHL_SUMS_128(d) GHL_SUMS_96(d), GHL_SUMS_32(d, 96)
#define GHL_NAMES_64                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GHL_NAMES_96                                                                      \
  GHL_NAMES_64                                                                            \
  ", "                                                                                    \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, " \
  "%81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GHL_NAMES_128                                                                    \
  GHL_NAMES_96                                                                           \
  ", "                                                                                   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"

// d += a b for a 64×16 and b 16×COLUMNS, both behind descriptors and both transposed: their rows of
// the sum lie one after another, neurons and columns side by side. The trailing immediates are
// scale-d, sign of a and of b, transposition of a and of b.
#define GHL_MULTIPLY(NUMBER, TYPE, SUMS, COLUMNS, A, B)                                \
  GHL_DEVICE void multiply(float (&d)[SUMS], uint64_t a, uint64_t b, NUMBER) {         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE \
                 " {" GHL_NAMES_##SUMS "}, %" #A ", %" #B ", 1, 1, 1, 1, 1;"           \
                 : GHL_SUMS_##SUMS(d)                                                  \
                 : "l"(a), "l"(b));                                                    \
  }
#define GHL_MULTIPLY_BOTH(SUMS, COLUMNS, A, B)        \
  GHL_MULTIPLY(bfloat16, "bf16", SUMS, COLUMNS, A, B) \
  GHL_MULTIPLY(float16, "f16", SUMS, COLUMNS, A, B)

GHL_MULTIPLY_BOTH(64, 128, 64, 65)
GHL_MULTIPLY_BOTH(96, 192, 96, 97)
GHL_MULTIPLY_BOTH(128, 256, 128, 129)

#undef GHL_MULTIPLY_BOTH
#undef GHL_MULTIPLY
#undef GHL_NAMES_128
#undef GHL_NAMES_96
#undef GHL_NAMES_64
#undef GHL_SUMS_128
#undef GHL_SUMS_96
#undef GHL_SUMS_64
#undef GHL_SUMS_32
#undef GHL_SUMS_8

// setmaxnreg: of a whole warpgroup, whose threads have had OLD registers and have NEW from here on.
template <int OLD, int NEW>
GHL_DEVICE void change_registers() {
  if (NEW > OLD)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(NEW));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(NEW));
}

// The larger of two pairs of 16-bit numbers each; a number rather than NaN.
GHL_DEVICE uint32_t larger(uint32_t a, uint32_t b, bfloat16) {
  uint32_t pair;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}
GHL_DEVICE uint32_t larger(uint32_t a, uint32_t b, float16) {
  uint32_t pair;
  asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// x, which all lanes of the warp agree on, in a form that the compiler knows they do.
GHL_DEVICE int uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

}  // namespace ghl::cuda::sm90
#endif
