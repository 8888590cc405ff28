// u from y, in registers: the device code that the dual weight gradients share.
//
// u is exp2((y - largest) * scale) * inverse, from the statistics of the row (logsumexp.h). Keeping
// the largest apart keeps u exact where y / tau is large.
#pragma once

#include "device.h"
#include "params.h"

namespace ghl::cuda {

// What exponents are taken relative to: 0 where a row has no finite largest number.
GHL_DEVICE float finite_or_zero(float largest) {
  return fabsf(largest) == INFINITY ? 0.0f : largest;
}

// 1 / total; NaN where softmax is NaN because the largest y is infinite.
GHL_DEVICE float inverse_of(float total, float largest, Competition competition) {
  return competition == Competition::hard ? total : 1.0f / total + (largest - largest);
}

// u of a number whose power is exp2((y - largest) * scale); 0 where `inverse` is 0, as it is for
// rows that are not there. `wins`: whether this neuron is the row's winner. `hard` has 1 or NaN as
// its inverse.
GHL_DEVICE float share_of(float power, float inverse, bool wins, Competition competition) {
  if (competition == Competition::hard) return wins ? inverse : inverse - inverse;
  const float u = power * inverse;
  return competition == Competition::softmax || wins ? u : -u;
}

// u of one number.
GHL_DEVICE float compete(float y, float largest, float inverse, bool wins, float scale,
                         Competition competition) {
  if (competition == Competition::linear) return y;
  return share_of(exp2_approximate((y - largest) * scale), inverse, wins, competition);
}

}  // namespace ghl::cuda
