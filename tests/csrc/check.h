// What the C++ test programs compare with, and how they end.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

namespace check {

inline int64_t compared = 0, failed = 0;

// `got` is within `bound` of `wanted`; NaN only where it is wanted, infinities alike.
inline void near(const char* test, const char* what, int64_t index, double got, double wanted,
                 double bound) {
  ++compared;
  const bool same = got == wanted || (std::isnan(got) && std::isnan(wanted));
  if (same || std::abs(got - wanted) <= bound) return;
  if (++failed <= 20)
    std::printf("%s: %s[%lld] is %.9g, must be %.9g within %.3g\n", test, what,
                static_cast<long long>(index), got, wanted, bound);
}

// The exit code of the program.
inline int result() {
  std::printf("%lld compared, %lld failed\n", static_cast<long long>(compared),
              static_cast<long long>(failed));
  return failed || !compared;
}

}  // namespace check
