#include "tape.h"

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>

#include <utility>

#include "../launches/launches.h"

// Of a torch with CUDA; another has none.
extern "C" __attribute__((weak)) int aoti_torch_get_current_cuda_stream(int32_t device, void**);

namespace ghl::replay {
namespace {

void* current_stream(const at::Device& device) {
  void* stream = nullptr;
  if (!device.is_cuda()) return stream;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream &&
                  !aoti_torch_get_current_cuda_stream(device.index(), &stream),
              "ghl_kernels: PyTorch tells no current stream of ", device);
  return stream;
}

c10::IValue argument(const Argument& a, const Call& call) {
  if (a.slot) return call.tensors[*a.slot];
  if (!a.slots) return a.value;
  c10::List<at::Tensor> tensors;
  for (const int64_t slot : *a.slots) tensors.push_back(call.tensors[slot]);
  return tensors;
}

// What an operator has returned, a list's tensors one by one.
std::vector<c10::IValue> results_of(const torch::jit::Stack& stack) {
  if (stack.size() != 1 || !stack[0].isTensorList()) return stack;
  std::vector<c10::IValue> results;
  for (const at::Tensor& t : stack[0].toTensorVector()) results.emplace_back(t);
  return results;
}

}  // namespace

Tape::Tape(int64_t inputs, int64_t slots, std::vector<int64_t> outputs, int64_t note)
    : inputs_(inputs), slots_(slots), outputs_(std::move(outputs)), note_(note) {}

void Tape::allocate(int64_t slot, std::vector<int64_t> size, std::vector<int64_t> stride,
                    at::ScalarType dtype, at::Device device) {
  const auto options = at::TensorOptions().dtype(dtype).device(device);
  steps_.push_back(
      [=](Call& call) { call.tensors[slot] = at::empty_strided(size, stride, options); });
}

void Tape::release(std::vector<int64_t> slots) {
  steps_.push_back([slots = std::move(slots)](Call& call) {
    for (const int64_t slot : slots) call.tensors[slot].reset();
  });
}

void Tape::call(const c10::OperatorHandle& op, std::vector<Argument> arguments,
                std::vector<std::optional<int64_t>> results) {
  steps_.push_back(
      [op, arguments = std::move(arguments), results = std::move(results)](Call& call) {
        torch::jit::Stack stack;
        stack.reserve(arguments.size());
        for (const Argument& a : arguments) stack.push_back(argument(a, call));
        op.callBoxed(stack);
        const std::vector<c10::IValue> made = results_of(stack);
        for (size_t i = 0; i < results.size(); ++i)
          if (results[i]) call.tensors[*results[i]] = made.at(i).toTensor();
      });
}

void Tape::launch(void* planned, std::vector<int64_t> slots) {
  const std::shared_ptr<void> owned(planned, ghl_launch_forget);
  steps_.push_back([owned, slots = std::move(slots)](Call& call) {
    std::vector<uint64_t> addresses;
    for (const int64_t slot : slots)
      addresses.push_back(reinterpret_cast<uint64_t>(call.tensors[slot].data_ptr()));
    const int error = ghl_launch_play(owned.get(), call.stream, addresses.data());
    if (error == kGhlLaunchUnavailable) throw Unavailable();
    TORCH_CHECK(error == 0, "launching a kernel again failed: ", ghl_launch_error(error));
  });
}

std::vector<at::Tensor> Tape::play(const std::vector<at::Tensor>& inputs) const {
  TORCH_CHECK(int64_t(inputs.size()) == inputs_ && inputs_ > 0, "a tape was given ", inputs.size(),
              " tensors, must be given ", inputs_);
  const at::Device device = inputs[0].device();
  const c10::DeviceGuard guard(device);
  Call call{inputs, current_stream(device)};
  call.tensors.resize(slots_);
  for (const auto& step : steps_) step(call);
  std::vector<at::Tensor> results;
  for (const int64_t slot : outputs_) results.push_back(call.tensors[slot]);
  return results;
}

}  // namespace ghl::replay
