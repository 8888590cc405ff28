// The steps of a call, done again for other tensors that lie alike, without Python.
//
// What ghl_kernels/tapes/tape.py plays where this was not built; it says there what a tape is.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace ghl::replay {

// A launch could not be made by csrc/launches. A tape writes into what it makes alone, so that a
// call can begin anew.
struct Unavailable {};

// The tensors of a call by their slots, and the stream that its launches go to.
struct Call {
  std::vector<at::Tensor> tensors;
  void* stream = nullptr;
};

// An argument of an operator: a value that is the same in every call, a tensor or a list of them.
struct Argument {
  c10::IValue value;
  std::optional<int64_t> slot;
  std::optional<std::vector<int64_t>> slots;
};

class Tape {
 public:
  Tape(int64_t inputs, int64_t slots, std::vector<int64_t> outputs, int64_t note);

  // The steps, in their order.
  void allocate(int64_t slot, std::vector<int64_t> size, std::vector<int64_t> stride,
                at::ScalarType dtype, at::Device device);
  void release(std::vector<int64_t> slots);
  void call(const c10::OperatorHandle& op, std::vector<Argument> arguments,
            std::vector<std::optional<int64_t>> results);
  // Takes a launch that ghl_launch_plan made, of the addresses of these tensors.
  void launch(void* planned, std::vector<int64_t> slots);

  // What the call returns for other inputs. Throws Unavailable.
  std::vector<at::Tensor> play(const std::vector<at::Tensor>& inputs) const;

  int64_t note() const { return note_; }

 private:
  int64_t inputs_, slots_;
  std::vector<int64_t> outputs_;
  int64_t note_;  // the caller's
  std::vector<std::function<void(Call&)>> steps_;
};

}  // namespace ghl::replay
