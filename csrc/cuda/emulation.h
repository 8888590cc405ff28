// What device.h names, run on the host: a GPU for tests of kernels, never for use.
//
// A block's threads are threads of the host, its barriers are real. Asynchronous copies arrive as
// late as they may, when they are waited for, and shared memory begins as NaN: a kernel that
// forgets a wait reads NaN, and one that forgets a barrier is a data race that ThreadSanitizer
// reports. Warp operations exchange what lanes hold by the fragment layouts of the PTX ISA
// (sections on ldmatrix and mma). Products are summed in float64 and rounded
// once, toward zero as tensor cores do.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define GHL_KERNEL
#define GHL_DEVICE inline
#define GHL_HOST_DEVICE inline
#define GHL_UNROLL
#define GHL_LAUNCH_BOUNDS(threads, blocks)
#define GHL_CONSTANT_ARGUMENT const

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Aligned as on the GPU, so that UBSan sees an address that a wide load would refuse.
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace ghl::cuda::emulation {

constexpr int kLanes = 32;

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// What the lanes of a warp show each other; two halves in turn, so that one barrier is enough.
struct Warp {
  Barrier barrier{kLanes};
  alignas(16) char shown[2][kLanes][64];
};

struct Block {
  Block(unsigned threads, size_t shared_bytes) : barrier(threads), warps(threads / kLanes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shared_bytes ? shared_bytes : 1)) std::abort();
    shared.reset(static_cast<char*>(memory));
    std::memset(shared.get(), 0xff, shared_bytes);
    for (auto& warp : warps) warp = std::make_unique<Warp>();
  }
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<char, Free> shared;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// The blocks of a cluster, which run at once.
struct Cluster {
  std::unique_ptr<Barrier> barrier;
  std::vector<Block*> blocks;
};

struct Thread {
  Block* block;
  Cluster* cluster;
  Barrier* grid;
  int lane;
  Warp* warp;
  int half = 0;
  std::deque<std::vector<Copy>> groups{1};  // the last is not committed yet
};

inline thread_local Thread* current = nullptr;

// What every lane shows, once all do.
template <class T>
const T* exchange(const T& mine, T (&all)[kLanes]) {
  static_assert(sizeof(T) <= 64);
  Thread& me = *current;
  me.half ^= 1;
  std::memcpy(me.warp->shown[me.half][me.lane], &mine, sizeof(T));
  me.warp->barrier.wait();
  for (int lane = 0; lane < kLanes; ++lane)
    std::memcpy(&all[lane], me.warp->shown[me.half][lane], sizeof(T));
  return all;
}

}  // namespace ghl::cuda::emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() {
  ghl::cuda::emulation::current->block->barrier.wait();
}
inline void __syncwarp() {
  ghl::cuda::emulation::current->warp->barrier.wait();
}

namespace ghl::cuda {

using std::max;
using std::min;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  _Float16 value;
};

inline char* shared_memory() {
  return emulation::current->block->shared.get();
}

inline void copy_async(void* shared, const void* global, int bytes) {
  emulation::current->groups.back().push_back({shared, global, bytes});
}

inline void copy_async_commit() {
  emulation::current->groups.emplace_back();
}

template <int PENDING>
void copy_async_wait() {
  auto& groups = emulation::current->groups;
  while (groups.size() > PENDING + 1) {
    for (const auto& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
    }
    groups.pop_front();
  }
}

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) {
  return x;
}
inline float to_float(bfloat16 x) {
  return bits_to_float(uint32_t(x.bits) << 16);
}
inline float to_float(float16 x) {
  return float(x.value);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = float_to_bits(x);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
  return {_Float16(x)};
}

template <class T>
T half_of(uint32_t pair, int which) {
  const uint16_t bits = uint16_t(pair >> 16 * which);
  T number;
  std::memcpy(&number, &bits, 2);
  return number;
}
template <class T>
float2 unpack(uint32_t pair, T) {
  return {to_float(half_of<T>(pair, 0)), to_float(half_of<T>(pair, 1))};
}
template <class T>
uint32_t pack(float first, float second, T) {
  const T both[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t pair;
  std::memcpy(&pair, both, 4);
  return pair;
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const void* rows[emulation::kLanes];
  emulation::exchange(row, rows);
  const int lane = emulation::current->lane;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const auto* numbers = static_cast<const uint16_t*>(rows[8 * matrix + 2 * (lane % 4) + i]);
      std::memcpy(&pair[i], numbers + lane / 4, 2);
    }
    std::memcpy(&r[matrix], pair, 4);
  }
}

namespace emulation {

struct Fragments {
  uint32_t a[4], b[2];
};

// The row and column of the register's number in the whole a (16 rows) or b (8 columns).
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
inline float of_a(const Fragments (&lanes)[kLanes], int row, int k, float) {
  return bits_to_float(lanes[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] & 0xffffe000u);
}
inline float of_b(const Fragments (&lanes)[kLanes], int k, int column, float) {
  return bits_to_float(lanes[column * 4 + k % 4].b[k / 4] & 0xffffe000u);
}
template <class T>
float of_a(const Fragments (&lanes)[kLanes], int row, int k, T) {
  return to_float(half_of<T>(lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2));
}
template <class T>
float of_b(const Fragments (&lanes)[kLanes], int k, int column, T) {
  return to_float(half_of<T>(lanes[column * 4 + k % 8 / 2].b[k / 8], k % 2));
}

}  // namespace emulation

inline float toward_zero(double x) {
  const float nearest = float(x);
  return std::abs(nearest) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T type) {
  constexpr int depth = sizeof(T) == 2 ? 16 : 8;
  emulation::Fragments mine, lanes[emulation::kLanes];
  std::memcpy(mine.a, a, sizeof(a));
  std::memcpy(mine.b, b, sizeof(b));
  emulation::exchange(mine, lanes);
  const int lane = emulation::current->lane;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < depth; ++k)
      sum += double(emulation::of_a(lanes, row, k, type)) * emulation::of_b(lanes, k, column, type);
    d[i] = toward_zero(sum);
  }
}

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = float_to_bits(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

template <class T>
T* as_it_is(T* pointer) {
  return pointer;
}
inline uint4 load_once(const void* global) {
  return *static_cast<const uint4*>(global);
}
inline void store_global(void* global, uint4 v) {
  *static_cast<uint4*>(global) = v;
}

inline float exp2_approximate(float x) {
  const float power = std::exp2(x);
  return power < 1.17549435e-38f ? 0.0f : power;
}

template <class T>
T shuffle_xor(T value, int mask) {
  T all[emulation::kLanes];
  return emulation::exchange(value, all)[emulation::current->lane ^ mask];
}

inline void synchronize_grid() {
  emulation::current->grid->wait();
}

namespace emulation {

// Runs kernel() on threads of `block` and coordinates of `grid`; the clusters one after another, or
// all at once for a cooperative launch.
inline void launch(dim3 grid, unsigned threads, size_t shared_bytes,
                   const std::function<void()>& kernel, bool cooperative = false,
                   unsigned cluster_size = 1) {
  const unsigned blocks = grid.x * grid.y * grid.z;
  Barrier whole_grid(blocks * threads);
  Cluster cluster;
  std::vector<std::thread> running;
  std::vector<std::unique_ptr<Block>> block_of;
  const auto join = [&] {
    for (auto& thread : running) thread.join();
    running.clear();
    block_of.clear();
  };
  for (unsigned b = 0; b < blocks; ++b) {
    if (b % cluster_size == 0) {
      if (!cooperative) join();
      cluster.barrier = std::make_unique<Barrier>(cluster_size * threads);
      cluster.blocks.clear();
      for (unsigned i = 0; i < cluster_size; ++i) {
        block_of.push_back(std::make_unique<Block>(threads, shared_bytes));
        cluster.blocks.push_back(block_of.back().get());
      }
    }
    for (unsigned t = 0; t < threads; ++t) {
      running.emplace_back([&, b, t, block = cluster.blocks[b % cluster_size]] {
        Thread thread{block, &cluster, &whole_grid, int(t % kLanes),
                      block->warps[t / kLanes].get()};
        current = &thread;
        threadIdx = {t, 0, 0};
        blockDim = {threads, 1, 1};
        gridDim = grid;
        blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        kernel();
      });
    }
  }
  join();
}

}  // namespace emulation
}  // namespace ghl::cuda
