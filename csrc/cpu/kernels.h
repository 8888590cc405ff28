// What the CPU kernels are given and which of them exist: pointers and sizes, no torch header.
//
// kernels.cpp is compiled once per instruction set and exports one Kernels table each;
// library.cpp, the seam, picks the table for this processor and turns tensors into these structs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../rule.h"

namespace ghl::cpu {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// A (N, C, H, W) tensor of any strides, in elements; a linear layer's rows are N, with H = W = 1.
struct Activation {
  const void* data;
  int64_t size[4];
  int64_t stride[4];
};

// Runs body(i, context) for i in [0, count), each perhaps on a thread of its own.
using Body = void (*)(int64_t index, void* context);
using ParallelFor = void (*)(int64_t count, Body body, void* context);

struct Threads {
  int64_t count;
  ParallelFor parallel_for;

  template <class F>
  void run(int64_t tasks, const F& task) const {
    parallel_for(
        tasks, [](int64_t i, void* f) { (*static_cast<const F*>(f))(i); }, const_cast<F*>(&task));
  }
};

struct PairParams {
  Activation x, y, g;
  int64_t kernel_size[2], stride[2], padding[2], dilation[2];
  int64_t groups;
  Competition competition;
  double tau;
  Dtype dtype;         // of x, y and g; sums are float64 for float64, else float32
  void* G;             // out_channels rows of in_channels / groups * kh * kw
  void* H0;            // likewise
  void* totals;        // sum of u for each neuron, then the number of rows
  bool channels_last;  // a row of G is (kh, kw, in_channels / groups), else (.., kh, kw)
};

struct LogsumexpParams {
  Activation y;
  double tau;
  Dtype dtype;
  void* lse;  // (N, H, W), contiguous
};

struct MergeParams {
  const void *G, *H0, *totals, *w;  // all in the dtype of sums and in one memory order
  void* update;                     // may be H0 itself
  void *neurons, *layer;            // (3, neurons) and (3): <G, H>, |G|^2, |H|^2
  int64_t out_channels, row_size;
  Decay decay;
  Gate gate;
  Normalize normalize;
  bool float64;
};

struct Kernels {
  const char* instruction_set;
  size_t (*pair_workspace_bytes)(const PairParams&, int64_t threads);
  void (*pair)(const PairParams&, const Threads&, void* workspace);
  size_t (*logsumexp_workspace_bytes)(const LogsumexpParams&, int64_t threads);
  void (*logsumexp)(const LogsumexpParams&, const Threads&, void* workspace);
  void (*merge)(const MergeParams&, const Threads&);
};

}  // namespace ghl::cpu
