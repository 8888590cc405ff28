// Calls of an operator like earlier ones, played from tapes: what ghl_kernels/replay.py does,
// where not even a dictionary of Python's is asked. Python records, and hands its tapes over.
//
// Knows PyTorch by more than its stable interface, whose calls lose what an error says: it is built
// for one version, and Python asks for that before it asks for anything else.
#include <ATen/ScalarOps.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

#include "../abi.h"
#include "tape.h"

namespace ghl::replay {
namespace {

constexpr size_t kMostTapes = 4096;  // of an operator
constexpr size_t kAlignment = 16;    // bytes; kernels are chosen by no more

std::atomic<int> paused{0};         // how often Python wants every call
std::atomic<int64_t> forgotten{0};  // how often all was

template <class T>
void append(std::string& kind, const T& value) {
  kind.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_all(std::string& kind, c10::ArrayRef<int64_t> values) {
  append(kind, values.size());
  kind.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

// All that a call depends on of a tensor, as `lie` of ghl_kernels/replay.py; false if that is
// more.
bool append_tensor(std::string& kind, const at::Tensor& t) {
  if (!t.defined() || t.layout() != at::kStrided) return false;
  append_all(kind, t.sizes());
  append_all(kind, t.strides());
  append(kind, t.scalar_type());
  append(kind, t.device());
  append(kind, reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kAlignment);
  return true;
}

bool append_argument(std::string& kind, const c10::IValue& value) {
  if (value.isTensor()) return append_tensor(kind, value.toTensor());
  if (value.isTensorList()) {
    append(kind, value.toListRef().size());
    for (const c10::IValue& t : value.toListRef())
      if (!append_tensor(kind, t.toTensor())) return false;
  } else if (value.isIntList()) {
    append_all(kind, value.toIntVector());
  } else if (value.isString()) {
    append(kind, value.toStringRef().size());
    kind += value.toStringRef();
  } else if (value.isDouble()) {
    append(kind, value.toDouble());
  } else if (value.isInt() || value.isBool()) {
    append(kind, value.isInt() ? value.toInt() : int64_t(value.toBool()));
  } else if (value.isNone()) {
    append(kind, 'N');
  } else {
    return false;
  }
  return true;
}

// The tensors at the beginning of a call's arguments, those of lists among them.
std::vector<at::Tensor> tensors_of(c10::ArrayRef<c10::IValue> arguments) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& value : arguments) {
    if (value.isTensor()) {
      found.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const c10::IValue& t : value.toListRef()) found.push_back(t.toTensor());
    } else {
      break;
    }
  }
  return found;
}

// What an operator of that schema returns: tensors, or lists of as many each.
void push_results(torch::jit::Stack& stack, const c10::FunctionSchema& schema,
                  std::vector<at::Tensor> results) {
  const size_t count = schema.returns().size();
  if (schema.returns()[0].type()->kind() != c10::TypeKind::ListType) {
    for (at::Tensor& t : results) stack.emplace_back(std::move(t));
    return;
  }
  const size_t each = results.size() / count;
  for (size_t i = 0; i < count; ++i)
    stack.emplace_back(
        std::vector<at::Tensor>(results.begin() + i * each, results.begin() + (i + 1) * each));
}

// Tapes of one operator by what calls have in common that do the same to other numbers.
class Replayed {
 public:
  Replayed(const std::string& name, bool multiplies)
      : multiplies_(multiplies),
        otherwise_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")) {}

  const c10::FunctionSchema& schema() const { return otherwise_.schema(); }

  void call(torch::jit::Stack& stack) {
    const size_t count = schema().arguments().size();
    const auto arguments = torch::jit::last(stack, count);
    if (const auto tape = paused == 0 ? find(arguments) : nullptr) {
      try {
        std::vector<at::Tensor> results = tape->play(tensors_of(arguments));
        torch::jit::drop(stack, count);
        push_results(stack, schema(), std::move(results));
        last_ = tape->note();
        ++played_;
        return;
      } catch (const Unavailable&) {
      }
    }
    otherwise_.callBoxed(stack);
  }

  // What calls like one have in common; none for one that only Python plays.
  std::optional<std::string> kind_of(c10::ArrayRef<c10::IValue> arguments) const {
    // whether products of float32 may be in TF32 is asked in Python
    if (multiplies_ && arguments[0].toTensor().scalar_type() == at::kFloat) return {};
    std::string kind;
    kind.reserve(512);
    for (const c10::IValue& value : arguments)
      if (!append_argument(kind, value)) return {};
    return kind;
  }

  // Have calls of a kind played from a tape, unless all was forgotten since it was begun; false if
  // there are too many, and none is left.
  bool keep(const std::string& kind, std::shared_ptr<const Tape> tape, int64_t begun) {
    const std::unique_lock lock(mutex_);
    const bool room = tapes_.size() < kMostTapes;
    if (!room) tapes_.clear();
    if (room && begun == forgotten) tapes_[kind] = std::move(tape);
    return room;
  }

  void forget() {
    const std::unique_lock lock(mutex_);
    tapes_.clear();
  }

  // How many calls were played, and the note of the last.
  std::pair<int64_t, int64_t> last() const { return {played_, last_}; }

 private:
  std::shared_ptr<const Tape> find(c10::ArrayRef<c10::IValue> arguments) const {
    const auto kind = kind_of(arguments);
    const std::shared_lock lock(mutex_);
    const auto found = kind ? tapes_.find(*kind) : tapes_.end();
    return found == tapes_.end() ? nullptr : found->second;
  }

  const bool multiplies_;
  const c10::OperatorHandle otherwise_;
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Tape>> tapes_;
  std::atomic<int64_t> played_{0}, last_{0};
};

// What a dispatch key calls.
class Kernel : public c10::OperatorKernel {
 public:
  explicit Kernel(std::shared_ptr<Replayed> replayed) : replayed_(std::move(replayed)) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const at::AutoDispatchBelowADInplaceOrView below;
    replayed_->call(*stack);
  }

 private:
  std::shared_ptr<Replayed> replayed_;
};

// Never destroyed: threads of autograd's may outlive Python.
std::unordered_map<std::string, std::shared_ptr<Replayed>>& operators() {
  static auto* all = new std::unordered_map<std::string, std::shared_ptr<Replayed>>();
  return *all;
}

struct Served {
  torch::Library library;
};

// Have `name` play the tapes of an operator for a dispatch key, and call that operator otherwise;
// as long as what is returned lives.
std::unique_ptr<Served> serve(const std::string& name, const std::string& op,
                              const std::string& key, bool multiplies) {
  auto& replayed = operators()[op];
  if (!replayed) replayed = std::make_shared<Replayed>("ghl_kernels::" + op, multiplies);
  auto served = std::make_unique<Served>(Served{
      {torch::Library::IMPL, "ghl_kernels", c10::parseDispatchKey(key), __FILE__, __LINE__}});
  served->library.impl(
      name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::make_unique<Kernel>(replayed)));
  return served;
}

// A call's arguments, all of them, as the operator is given them.
std::vector<c10::IValue> values_of(const std::string& op, const py::tuple& arguments) {
  std::vector<c10::IValue> values;
  for (const c10::Argument& a : operators().at(op)->schema().arguments()) {
    const size_t i = values.size();
    values.push_back(i < arguments.size() ? torch::jit::toIValue(arguments[i], a.real_type())
                                          : a.default_value().value());
  }
  return values;
}

// A number in the place of a tensor, which takes part in no promotion of dtypes.
at::Tensor as_tensor(const at::Scalar& number) {
  at::Tensor t = at::scalar_to_tensor(number);
  t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

// An argument as Python has it: what it is, and that.
Argument argument_of(const py::tuple& given, const c10::TypePtr& type) {
  const auto what = given[0].cast<std::string>();
  Argument made;
  if (what == "slot") {
    made.slot = given[1].cast<int64_t>();
  } else if (what == "slots") {
    made.slots = given[1].cast<std::vector<int64_t>>();
  } else if (type->kind() == c10::TypeKind::TensorType && PyNumber_Check(given[1].ptr()) &&
             !THPVariable_Check(given[1].ptr())) {
    made.value = as_tensor(torch::jit::toIValue(given[1], c10::NumberType::get()).toScalar());
  } else {
    made.value = torch::jit::toIValue(given[1], type);
  }
  return made;
}

// Adds the call of an operator; positional and named arguments as `argument_of` takes them.
void add_call(Tape& tape, const std::string& name, const std::string& overload,
              const py::list& positional, const py::dict& named,
              std::vector<std::optional<int64_t>> results) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), overload.c_str());
  std::vector<Argument> arguments;
  for (const c10::Argument& a : op.schema().arguments()) {
    const size_t i = arguments.size();
    if (i < positional.size()) {
      arguments.push_back(argument_of(positional[i].cast<py::tuple>(), a.real_type()));
    } else if (named.contains(a.name())) {
      arguments.push_back(argument_of(named[a.name().c_str()].cast<py::tuple>(), a.real_type()));
    } else {
      TORCH_CHECK(a.default_value(), name, " is not given ", a.name());
      arguments.push_back({*a.default_value(), {}, {}});
    }
  }
  tape.call(op, std::move(arguments), std::move(results));
}

}  // namespace
}  // namespace ghl::replay

PYBIND11_MODULE(_replay, module) {
  using namespace ghl::replay;
  module.attr("abi") = GHL_ABI;
  module.attr("torch_version") = GHL_TORCH_HEADERS;
  module.attr("source_hash") = GHL_SOURCE_HASH;
  py::class_<Tape, std::shared_ptr<Tape>>(module, "Tape", py::module_local())
      .def(py::init<int64_t, int64_t, std::vector<int64_t>, int64_t>())
      .def("allocate", &Tape::allocate)
      .def("release", &Tape::release)
      .def("call", &add_call)
      .def("launch",
           [](Tape& tape, uintptr_t planned, std::vector<int64_t> slots) {
             tape.launch(reinterpret_cast<void*>(planned), std::move(slots));
           })
      .def("play", &Tape::play, py::call_guard<py::gil_scoped_release>());
  py::class_<Served>(module, "Served", py::module_local());
  module.def("serve", &serve);
  module.def("kind_of", [](const std::string& op, const py::tuple& arguments) -> py::object {
    const auto kind = operators().at(op)->kind_of(values_of(op, arguments));
    return kind ? py::object(py::bytes(*kind)) : py::none();
  });
  module.def("keep",
             [](const std::string& op, const std::string& kind, std::shared_ptr<Tape> tape,
                int64_t begun) { return operators().at(op)->keep(kind, std::move(tape), begun); });
  module.def("forgotten", [] { return forgotten.load(); });
  module.def("pause", [](int more) { paused += more; });
  module.def("forget", [] {
    ++forgotten;
    for (auto& [name, replayed] : operators()) replayed->forget();
  });
  module.def("last", [](const std::string& name) {
    const auto found = operators().find(name);
    return found == operators().end() ? std::pair<int64_t, int64_t>() : found->second->last();
  });
}
