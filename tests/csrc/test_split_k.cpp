// split_k.h against a loop in double precision, and bit for bit against the order it promises.
#include <random>

#include "../../csrc/cuda/split_k.h"
#include "check.h"

namespace ghl::cuda {
namespace {

constexpr int kThreads = 64;

struct Case {
  const char* name;
  int64_t weights;
  int neurons, splits;
  bool u = true;
  int offset = 0;
};

// Parts of one result, and the result.
struct Sums {
  const char* what;
  int64_t count;
  int splits, offset;
  std::vector<float> parts, result;

  Sums(const char* what, int64_t count, const Case& c, std::mt19937& random)
      : what(what),
        count(count),
        splits(c.splits),
        offset(c.offset),
        parts(offset + count * splits),
        result(offset + count, NAN) {
    std::normal_distribution<float> normal;
    for (float& part : parts) part = normal(random);
    if (count > 3) {
      parts[offset + 2] = INFINITY;
      parts[offset + (splits - 1) * count + 3] = NAN;
    }
  }

  void compare(const char* name, int groups) const {
    for (int64_t i = 0; i < count; ++i) {
      double wanted = 0, terms = 0;
      float in_order = 0;
      const int each = (splits + groups - 1) / groups;
      for (int first = 0; first < splits; first += each) {
        float run = 0;
        for (int s = first; s < std::min(first + each, splits); ++s) {
          const float part = parts[offset + s * count + i];
          wanted += part, terms += std::abs(part), run += part;
        }
        in_order += run;
      }
      check::near(name, what, i, result[offset + i], wanted, 1e-6 * terms);
      check::near(name, what, i, result[offset + i], in_order, 0);
    }
  }
};

void test(const Case& c) {
  std::mt19937 random(1);
  Sums G("G", c.weights, c, random), H0("H0", c.weights, c, random);
  Sums u("u_sums", c.neurons, c, random);
  SumSplitsParams p{};
  p.G_parts = G.parts.data() + c.offset, p.G = G.result.data() + c.offset;
  p.H0_parts = H0.parts.data() + c.offset, p.H0 = H0.result.data() + c.offset;
  if (c.u) p.u_parts = u.parts.data() + c.offset, p.u_sums = u.result.data() + c.offset;
  p.weights = c.weights, p.neurons = c.neurons, p.splits = c.splits;
  const SumSplitsArguments a = sum_splits_arguments(p);
  emulation::launch(sum_splits_grid(a, kThreads), kThreads, sum_splits_shared_bytes(kThreads),
                    [&] { sum_splits_kernel(a); });
  G.compare(c.name, a.groups), H0.compare(c.name, a.groups);
  if (c.u) u.compare(c.name, a.groups);
}

}  // namespace
}  // namespace ghl::cuda

int main() {
  for (const ghl::cuda::Case& c : {
           ghl::cuda::Case{"one number, two splits", 1, 1, 2},
           {"fours, few splits", 600, 12, 3},
           {"fours, as many splits as a thread has under way", 600, 9, 8},
           {"fours, no sums of u", 600, 12, 9, false},
           {"two groups, the last with fewer splits", 256, 8, 15},
           {"eight groups", 1000, 20, 132},
           {"eight groups, the last without splits", 300, 5, 33},
           {"one by one, eight groups", 147, 7, 100},
           {"one by one, few splits", 147, 7, 5},
           {"not aligned", 64, 8, 20, true, 1},
       })
    ghl::cuda::test(c);
  return check::result();
}
