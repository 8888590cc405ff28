// What sm90.h names, run on the host by the words of the PTX ISA, beside emulation.h.
//
// Products happen as late as they may, when they are waited for, and read their registers and
// shared memory then: what is overwritten too early is wrong. Copies happen at once, in the thread
// that begins them, and are ordered by their barrier alone. A wait of a minute is a deadlock and
// ends the program. What this cannot show is whether the words were understood: the swizzle, the
// descriptor and the walk of im2col are written here a second time, from the same pages.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>

#include "emulation.h"

namespace ghl::cuda::sm90 {

struct TensorMap {
  const void* data;
  uint64_t sizes[4], strides[3];  // bytes
  int32_t lower[2], upper[2];
  uint32_t steps[4];
};

namespace emulated {

// An mbarrier, in its 64 bits.
struct State {
  uint64_t phase : 1, arrivals : 12, pending : 12;
  int64_t bytes : 39;
};
static_assert(sizeof(State) == 8);

inline std::mutex mutex;
inline std::condition_variable changed;

inline void fail(const char* what) {
  std::fprintf(stderr, "emulated sm_90a: %s\n", what);
  std::abort();
}

inline void update(uint64_t* barrier, int arrivals, int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  State state;
  std::memcpy(&state, barrier, 8);
  if (state.pending < unsigned(arrivals)) fail("more arrivals than a phase has");
  state.pending -= arrivals;
  state.bytes += bytes;
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.arrivals;
    changed.notify_all();
  }
  std::memcpy(barrier, &state, 8);
}

inline bool has_ended(const uint64_t* barrier, uint32_t parity) {
  State state;
  std::memcpy(&state, barrier, 8);
  return state.phase != parity;
}

inline uintptr_t base() {
  return reinterpret_cast<uintptr_t>(shared_memory());
}
// What lies at the same place in the shared memory of another block of the cluster.
template <class T>
T* at(T* shared, int rank) {
  const auto offset = reinterpret_cast<uintptr_t>(shared) - base();
  char* there = emulation::current->cluster->blocks[rank]->shared.get();
  return reinterpret_cast<T*>(there + offset);
}
// The 128-byte swizzle: bits 4 to 6 of an address, by bits 7 to 9.
inline uintptr_t swizzled_address(uintptr_t address) {
  return address ^ (address >> 7 & 7) << 4;
}
inline char* swizzle(uintptr_t address) {
  return shared_memory() + swizzled_address(address);
}

struct Products {
  bool fenced = false;
  std::deque<std::vector<std::function<void()>>> groups{1};  // the last is not committed yet
};
inline thread_local Products products;

inline void add(std::function<void()> product) {
  if (!products.fenced) fail("a product without wgmma.fence before it");
  products.groups.back().push_back(std::move(product));
}

// Number (k, i) of an operand whose numbers lie along i: PTX ISA, "Strides" and "Canonical
// Layouts" of matrices in shared memory, MN-major with 128-byte swizzle.
template <class T>
float number(uint64_t operand, int k, int i, T) {
  if (operand >> 62 != 1 || (operand >> 49 & 7) != 0) fail("not a 128-byte swizzle from its start");
  const uintptr_t start = (operand & 0x3fff) << 4;
  const uintptr_t leading = (operand >> 16 & 0x3fff) << 4, stride = (operand >> 32 & 0x3fff) << 4;
  T value;
  std::memcpy(&value, swizzle(start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2),
              sizeof(T));
  return to_float(value);
}

template <class T, int N>
void product(float (&d)[N], uint64_t a, uint64_t b, T type) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  float rows[2][16];
  for (int upper = 0; upper < 2; ++upper) {
    for (int k = 0; k < 16; ++k)
      rows[upper][k] = number(a, k, thread / 32 * 16 + lane / 4 + upper * 8, type);
  }
  for (int i = 0; i < N; ++i) {
    const int upper = i / 2 % 2, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += double(rows[upper][k]) * number(b, k, column, type);
    d[i] = float(sum);
  }
}

}  // namespace emulated

inline uint32_t shared_address(const void* shared) {
  return uint32_t(reinterpret_cast<uintptr_t>(shared) - emulated::base());
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  const emulated::State state{0, arrivals, arrivals, 0};
  std::memcpy(barrier, &state, 8);
}
inline void barriers_ready() {}
inline void barrier_arrive(uint64_t* barrier) {
  emulated::update(barrier, 1, 0);
}
inline void barrier_arrive_at(uint64_t* barrier, int rank) {
  emulated::update(emulated::at(barrier, rank), 1, 0);
}
inline void synchronize_cluster() {
  emulation::current->cluster->barrier->wait();
}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  emulated::update(barrier, 1, bytes);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  std::unique_lock<std::mutex> lock(emulated::mutex);
  const bool ended = emulated::changed.wait_for(
      lock, std::chrono::minutes(1), [&] { return emulated::has_ended(barrier, parity); });
  if (!ended) emulated::fail("deadlock");
}

template <class Ready>
void wait_until(const Ready& ready) {
  const auto start = std::chrono::steady_clock::now();
  while (!ready()) {
    if (std::chrono::steady_clock::now() - start > std::chrono::minutes(1))
      emulated::fail("deadlock");
    std::this_thread::yield();
  }
}
inline void global_written() {}
inline void count_up(int32_t* counter) {
  __atomic_fetch_add(counter, 1, __ATOMIC_RELEASE);
}
inline int32_t counted(const int32_t* counter) {
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

inline void shared_written() {}
inline void prefetch_map(const TensorMap*) {}

// One row of a box: 64 numbers from `first` of the innermost dimension, zeros where nothing is.
// `memory`: that of the block it goes to.
inline void load_row(char* memory, uint32_t box, int row, const TensorMap& map, int32_t first,
                     bool inside, uint64_t offset) {
  for (int i = 0; i < 64; ++i) {
    uint16_t number = 0;
    if (inside && first + i >= 0 && uint64_t(first + i) < map.sizes[0])
      std::memcpy(&number, static_cast<const char*>(map.data) + offset + 2 * (first + i), 2);
    std::memcpy(memory + emulated::swizzled_address(box + row * 128 + i * 2), &number, 2);
  }
}
// copy(memory) for the block itself or, if BLOCKS are more than one, for all of its cluster, whose
// barriers are told.
template <int BLOCKS, class Copy>
void load_into(uint64_t* barrier, const Copy& copy) {
  for (int rank = 0; rank < BLOCKS; ++rank) {
    copy(BLOCKS > 1 ? emulated::at(shared_memory(), rank) : shared_memory());
    emulated::update(BLOCKS > 1 ? emulated::at(barrier, rank) : barrier, 0, -64 * 128);
  }
}

inline void check_column(int32_t column) {
  if (column % 8 != 0) emulated::fail("an innermost coordinate that is no multiple of 16 bytes");
}

template <int BLOCKS>
void load_box(void* box, const TensorMap* map, uint64_t* barrier, int32_t column, int32_t row) {
  check_column(column);
  load_into<BLOCKS>(barrier, [&](char* memory) {
    for (int r = 0; r < 64; ++r)
      load_row(memory, shared_address(box), r, *map, column, uint64_t(row + r) < map->sizes[1],
               (row + r) * map->strides[0]);
  });
}

template <int BLOCKS>
void load_patches(void* box, const TensorMap* map, uint64_t* barrier, int32_t channel, int32_t w,
                  int32_t h, int32_t n, uint16_t tap_w, uint16_t tap_h) {
  check_column(channel);
  const int32_t last_w = int32_t(map->sizes[1]) - 1 + map->upper[0];
  const int32_t last_h = int32_t(map->sizes[2]) - 1 + map->upper[1];
  if (w < map->lower[0] || w > last_w || h < map->lower[1] || h > last_h || tap_w > 255 ||
      tap_h > 255)
    emulated::fail("a first pixel outside the bounding box, or too far a tap");
  load_into<BLOCKS>(barrier, [&, first_w = w, first_h = h, first_n = n](char* memory) {
    int32_t w = first_w, h = first_h, n = first_n;
    for (int r = 0; r < 64; ++r) {
      const int64_t at_w = w + tap_w, at_h = h + tap_h;
      const bool inside = at_w >= 0 && at_w < int64_t(map->sizes[1]) && at_h >= 0 &&
                          at_h < int64_t(map->sizes[2]) && uint64_t(n) < map->sizes[3];
      load_row(memory, shared_address(box), r, *map, channel, inside,
               at_w * map->strides[0] + at_h * map->strides[1] + n * map->strides[2]);
      w += map->steps[1];
      if (w > last_w) w = map->lower[0], h += map->steps[2];
      if (h > last_h) h = map->lower[1], ++n;
    }
  });
}

inline void products_fence() {
  emulated::products.fenced = true;
}
inline void products_commit() {
  emulated::products.fenced = false;
  emulated::products.groups.emplace_back();
}
template <int PENDING>
void products_wait() {
  auto& groups = emulated::products.groups;
  while (groups.size() > PENDING + 1) {
    for (auto& product : groups.front()) product();
    groups.pop_front();
  }
}

template <class T, int N>
void hold(T (&)[N]) {}

template <class T, int N>
void multiply(float (&d)[N], uint64_t a, uint64_t b, T type) {
  emulated::add([&d, a, b, type] { emulated::product(d, a, b, type); });
}

template <class T>
uint32_t larger(uint32_t a, uint32_t b, T type) {
  const float2 x = unpack(a, type), y = unpack(b, type);
  return pack(std::fmax(x.x, y.x), std::fmax(x.y, y.y), type);
}

template <int OLD, int NEW>
void change_registers() {}
inline int uniform(int x) {
  return x;
}

}  // namespace ghl::cuda::sm90
