// The vocabulary of ghl_kernels/rule.py in its order: a choice crosses the seam as its position.
#pragma once

namespace ghl {

enum class Competition : int { softmax, linear, hard, softhebb };
enum class Decay : int { oja, instar, none };
enum class Gate : int { sign, hebb, sign_only, gradient };
enum class Normalize : int { absmax, mean, none };

}  // namespace ghl
