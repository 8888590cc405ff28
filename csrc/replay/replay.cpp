// Calls of an operator like earlier ones, played from tapes: what ghl_kernels/replay.py does, where
// not even a dictionary of Python's is asked. Python records, and hands its tapes over.
//
// Knows PyTorch by more than its stable interface, whose calls lose what an error says: it is built
// for one version, and Python asks for that before it asks for anything else.
#include <ATen/ScalarOps.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
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

std::atomic<int> paused{0};     // how often Python wants every call
std::atomic<int64_t> since{0};  // how often all was forgotten

template <class T>
void append(std::string& kind, const T& value) {
  kind.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void append_all(std::string& kind, c10::ArrayRef<int64_t> values) {
  append(kind, values.size());
  kind.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t));
}

// All that a call depends on of a tensor; false if that is more than how it lies.
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
  if (value.isIntList()) {
    append_all(kind, value.toIntVector());
  } else if (value.isString()) {
    append(kind, value.toStringRef().size());
    kind += value.toStringRef();
  } else if (value.isDouble()) {
    append(kind, value.toDouble());
  } else if (value.isInt() || value.isBool()) {
    append(kind, value.isInt() ? value.toInt() : int64_t(value.toBool()));
  } else {
    return false;
  }
  return true;
}

// Tapes of one operator by what calls have in common that do the same to other numbers.
class Replayed {
 public:
  Replayed(const std::string& name, bool multiplies)
      : multiplies_(multiplies),
        otherwise_(c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "")) {}

  void call(torch::jit::Stack& stack) {
    const size_t arguments = otherwise_.schema().arguments().size();
    const auto given = torch::jit::last(stack, arguments);
    std::string kind;
    const bool known = paused == 0 && is_described(given, kind);
    if (const auto tape = known ? find(kind) : nullptr) {
      try {
        const std::vector<at::Tensor> results = tape->play(given);
        torch::jit::drop(stack, arguments);
        for (const at::Tensor& t : results) stack.emplace_back(t);
        last_ = tape->note();
        ++played_;
        return;
      } catch (const Unavailable&) {
      }
    }
    const Waiting waiting(known ? this : nullptr, kind);
    otherwise_.callBoxed(stack);
  }

  // Of the call of this thread that Python is in: true if calls like it will be played from it.
  static bool offer(std::shared_ptr<const Tape> tape) {
    if (!waiting || !waiting->of || waiting->began != since) return false;
    waiting->of->keep(waiting->kind, std::move(tape));
    return true;
  }

  void forget() {
    const std::unique_lock lock(mutex_);
    tapes_.clear();
  }

  // How many calls were played, and the note of the last.
  std::pair<int64_t, int64_t> last() const { return {played_, last_}; }

 private:
  // A call that went on to Python.
  struct Waiting {
    Waiting(Replayed* whose, const std::string& what) : of(whose), kind(what), before(waiting) {
      waiting = this;
    }
    ~Waiting() { waiting = before; }
    Waiting(const Waiting&) = delete;
    Replayed* of;
    const std::string& kind;
    const int64_t began = since;
    Waiting* before;
  };
  static thread_local Waiting* waiting;

  bool is_described(c10::ArrayRef<c10::IValue> given, std::string& kind) const {
    // whether float32 may be TF32 is asked in Python
    if (multiplies_ && given[0].toTensor().scalar_type() == at::kFloat) return false;
    kind.reserve(512);
    for (const c10::IValue& value : given)
      if (!append_argument(kind, value)) return false;
    return true;
  }

  std::shared_ptr<const Tape> find(const std::string& kind) const {
    const std::shared_lock lock(mutex_);
    const auto found = tapes_.find(kind);
    return found == tapes_.end() ? nullptr : found->second;
  }

  void keep(const std::string& kind, std::shared_ptr<const Tape> tape) {
    const std::unique_lock lock(mutex_);
    if (tapes_.size() >= kMostTapes) tapes_.clear();
    tapes_[kind] = std::move(tape);
  }

  const bool multiplies_;
  const c10::OperatorHandle otherwise_;
  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Tape>> tapes_;
  std::atomic<int64_t> played_{0}, last_{0};
};

thread_local Replayed::Waiting* Replayed::waiting = nullptr;

// What a dispatch key calls.
class Kernel : public c10::OperatorKernel {
 public:
  explicit Kernel(std::shared_ptr<Replayed> replayed) : replayed_(std::move(replayed)) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
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

// Have `name` play the tapes of an operator for a dispatch key, and call that operator otherwise;
// as long as what is returned lives.
struct Served {
  torch::Library library;
};

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
  py::class_<Tape, std::shared_ptr<Tape>>(module, "Tape", py::module_local())
      .def(py::init<int64_t, int64_t, std::vector<int64_t>, int64_t>())
      .def("allocate", &Tape::allocate)
      .def("release", &Tape::release)
      .def("call", &add_call)
      .def("launch",
           [](Tape& tape, uintptr_t planned, std::vector<int64_t> slots) {
             tape.launch(reinterpret_cast<void*>(planned), std::move(slots));
           })
      .def("play", [](const Tape& tape, const std::vector<at::Tensor>& inputs) {
        const py::gil_scoped_release released;
        return tape.play(std::vector<c10::IValue>(inputs.begin(), inputs.end()));
      });
  py::class_<Served>(module, "Served", py::module_local());
  module.def("serve", &serve);
  module.def("offer", [](std::shared_ptr<Tape> tape) { return Replayed::offer(std::move(tape)); });
  module.def("pause", [](int more) { paused += more; });
  module.def("forget", [] {
    ++since;
    for (auto& [name, replayed] : operators()) replayed->forget();
  });
  module.def("last", [](const std::string& name) {
    const auto found = operators().find(name);
    return found == operators().end() ? std::pair<int64_t, int64_t>() : found->second->last();
  });
}
