// One instruction set's kernels: compiled several times, with GHL_INSTRUCTION_SET naming each.
#include "kernels.h"

#include "logsumexp.h"
#include "merge.h"
#include "pair.h"

namespace ghl::cpu {
namespace {

// f(In, T) with a value of each type: that of the activations and that of the sums.
template <class F>
auto with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float64: return f(double{}, double{});
    case Dtype::bfloat16: return f(BFloat16{}, float{});
    case Dtype::float16: return f(Float16{}, float{});
    default: return f(float{}, float{});
  }
}

template <template <class, class> class Kernel, class Params>
size_t workspace_bytes(const Params& p, int64_t threads) {
  return with_dtype(p.dtype, [&](auto in, auto sum) {
    return Kernel<decltype(in), decltype(sum)>(p, threads, nullptr).workspace_bytes();
  });
}

template <template <class, class> class Kernel, class Params>
void run(const Params& p, const Threads& threads, void* workspace) {
  with_dtype(p.dtype, [&](auto in, auto sum) {
    Kernel<decltype(in), decltype(sum)>(p, threads.count, workspace).run(threads);
  });
}

void merge(const MergeParams& p, const Threads& threads) {
  if (p.float64) {
    MergeKernel<double>(p).run(threads);
  } else {
    MergeKernel<float>(p).run(threads);
  }
}

}  // namespace

#define GHL_STRING_(x) #x
#define GHL_STRING(x) GHL_STRING_(x)
#define GHL_JOIN_(a, b) a##b
#define GHL_JOIN(a, b) GHL_JOIN_(a, b)

extern const Kernels GHL_JOIN(kernels_, GHL_INSTRUCTION_SET);
const Kernels GHL_JOIN(kernels_, GHL_INSTRUCTION_SET) = {
    GHL_STRING(GHL_INSTRUCTION_SET),       workspace_bytes<PairKernel, PairParams>,
    run<PairKernel, PairParams>,           workspace_bytes<LogsumexpKernel, LogsumexpParams>,
    run<LogsumexpKernel, LogsumexpParams>, merge,
};

}  // namespace ghl::cpu
