// The seam of the CPU library: tensors become the kernels' structs here, once, and nowhere else.
//
// Implements the `.native` overloads declared in ghl_kernels/ops.py against LibTorch's stable ABI.
// Shapes and dtypes were checked in Python; what is checked here is what a wrong call from
// elsewhere would turn into a bad memory access.
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../seam.h"
#include "kernels.h"
#include "kernels_list.h"

namespace ghl::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen{usable_kernels().front()};
  return chosen;
}

const Kernels& kernels() {
  return *chosen_kernels().load();
}

void parallel_for(int64_t count, Body body, void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i, context);
  });
}

Threads threads() {
  return {static_cast<int64_t>(torch::stable::get_num_threads()), parallel_for};
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16");
  }
}

ScalarType sum_dtype(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

Activation activation(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, "activations must have 4 dimensions, have ", t.dim());
  Activation a{t.const_data_ptr(), {}, {}};
  for (int d = 0; d < 4; ++d) {
    a.size[d] = t.size(d);
    a.stride[d] = t.stride(d);
  }
  return a;
}

// `t` holds `elements` numbers of `dtype` without a gap.
void* dense(const Tensor& t, ScalarType dtype, int64_t elements) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "an output or sum has the wrong dtype");
  STD_TORCH_CHECK(is_gapless(t), "an output or sum has gaps");
  STD_TORCH_CHECK(t.numel() == elements, "an output has ", t.numel(), " elements, needs ",
                  elements);
  return t.mutable_data_ptr();
}

// Aligned memory for one call; in huge pages when it is large, for fewer faults and TLB misses.
constexpr size_t kHugePage = 2 << 20;

class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    const size_t page = bytes < kHugePage ? 64 : kHugePage;
    const size_t rounded = (bytes + page - 1) / page * page;
    memory_.reset(rounded ? std::aligned_alloc(page, rounded) : nullptr);
    STD_TORCH_CHECK(!rounded || memory_, "out of memory: ", rounded, " bytes of workspace");
#ifdef MADV_HUGEPAGE
    if (page == kHugePage) madvise(memory_.get(), rounded, MADV_HUGEPAGE);  // a hint: may fail
#endif
  }
  void* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
};

void pair(Tensor x, Tensor y, Tensor g, Tensor G, Tensor H0, Tensor totals,
          std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
          int64_t groups, int64_t competition, double tau, bool channels_last) {
  PairParams p{};
  p.x = activation(x);
  p.y = activation(y);
  p.g = activation(g);
  p.dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype_of(y) == p.dtype && dtype_of(g) == p.dtype, "x, y, g differ in dtype");
  STD_TORCH_CHECK(G.dim() == 4 && groups > 0, "G must have 4 dimensions, groups be positive");
  for (const std::vector<int64_t>* two : {&stride, &padding, &dilation})
    STD_TORCH_CHECK(two->size() == 2, "the geometry must be pairs of integers");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(p.g.size[d] == p.y.size[d], "y and g must have the same shape");
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0,
                    "the geometry has a number that is too small");
    p.kernel_size[d] = G.size(d + 2);
    p.stride[d] = stride[d];
    p.padding[d] = padding[d];
    p.dilation[d] = dilation[d];
    const int64_t reach = (p.y.size[d + 2] - 1) * stride[d] + dilation[d] * (p.kernel_size[d] - 1);
    STD_TORCH_CHECK(reach < p.x.size[d + 2] + 2 * padding[d], "the kernel reaches beyond x");
  }
  const int64_t neurons = p.y.size[1], inputs = p.x.size[1] / groups;
  const int64_t elements = neurons * inputs * p.kernel_size[0] * p.kernel_size[1];
  STD_TORCH_CHECK(neurons > 0 && neurons % groups == 0 && p.x.size[1] % groups == 0 &&
                      p.x.size[0] == p.y.size[0],
                  "x and y do not match");
  p.groups = groups;
  p.competition = static_cast<Competition>(competition);
  p.tau = tau;
  p.G = dense(G, sum_dtype(p.dtype), elements);
  p.H0 = dense(H0, sum_dtype(p.dtype), elements);
  p.totals = dense(totals, sum_dtype(p.dtype), neurons + 1);
  p.channels_last = channels_last;
  const Kernels& chosen = kernels();  // once: another thread may choose others
  const Threads here = threads();
  const Workspace workspace(chosen.pair_workspace_bytes(p, here.count));
  chosen.pair(p, here, workspace.get());
}

void logsumexp(Tensor y, Tensor lse, double tau) {
  LogsumexpParams p{activation(y), tau, dtype_of(y), nullptr};
  STD_TORCH_CHECK(p.y.size[1] > 0, "y has no neurons");
  p.lse = dense(lse, sum_dtype(p.dtype), p.y.size[0] * p.y.size[2] * p.y.size[3]);
  const Kernels& chosen = kernels();
  const Threads here = threads();
  const Workspace workspace(chosen.logsumexp_workspace_bytes(p, here.count));
  chosen.logsumexp(p, here, workspace.get());
}

void merge(Tensor G, Tensor H0, Tensor totals, Tensor w, Tensor update, Tensor neurons,
           Tensor layer, int64_t decay, int64_t gate, int64_t normalize) {
  MergeParams p{};
  STD_TORCH_CHECK(w.dim() > 0 && w.size(0) > 0, "w has no neurons");
  const int64_t elements = w.numel();
  const ScalarType dtype = G.scalar_type();
  p.float64 = dtype == ScalarType::Double;
  p.out_channels = w.size(0);
  p.row_size = elements / p.out_channels;
  p.G = dense(G, sum_dtype(dtype_of(G)), elements);
  p.H0 = dense(H0, dtype, elements);
  p.w = dense(w, dtype, elements);
  p.totals = dense(totals, dtype, p.out_channels + 1);
  p.update = dense(update, dtype, elements);
  p.neurons = dense(neurons, dtype, 3 * p.out_channels);
  p.layer = dense(layer, dtype, 3);
  p.decay = static_cast<Decay>(decay);
  p.gate = static_cast<Gate>(gate);
  p.normalize = static_cast<Normalize>(normalize);
  kernels().merge(p, threads());
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("pair.native", TORCH_BOX(&pair));
  m.impl("logsumexp.native", TORCH_BOX(&logsumexp));
  m.impl("merge.native", TORCH_BOX(&merge));
}

}  // namespace
}  // namespace ghl::cpu

GHL_DESCRIBE_LIBRARY("CPU", ghl::cpu::implement)

GHL_EXPORT const char* ghl_kernels_instruction_set() {
  return ghl::cpu::kernels().instruction_set;
}

// Take the kernels of that instruction set from now on; false if this processor has it not.
GHL_EXPORT bool ghl_kernels_use(const char* instruction_set) {
  for (const ghl::cpu::Kernels* kernels : ghl::cpu::usable_kernels()) {
    if (std::strcmp(kernels->instruction_set, instruction_set) != 0) continue;
    ghl::cpu::chosen_kernels() = kernels;
    return true;
  }
  return false;
}
