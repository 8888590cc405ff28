// What was built, and what a library beside this module reports about itself once loaded.
//
// No torch here: `ghl doctor` must be able to tell why a library does not load.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The symbol of a library that is already loaded; throws RuntimeError when it is not.
void* symbol(const std::string& path, const char* name) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) throw std::runtime_error(path + " is not loaded");
  void* found = dlsym(library, name);
  dlclose(library);
  if (!found) throw std::runtime_error(path + " has no symbol " + name);
  return found;
}

struct Resources {
  const char *kernel, *architecture;
  int registers, shared_bytes, spilled_bytes;
};

const std::vector<Resources> kKernels = {
#include "kernel_resources.inc"
};

pybind11::list kernel_resources() {
  pybind11::list rows;
  for (const Resources& r : kKernels)
    rows.append(pybind11::make_tuple(r.kernel, r.architecture, r.registers, r.shared_bytes,
                                     r.spilled_bytes));
  return rows;
}

std::string text(const std::string& path, const char* name) {
  return reinterpret_cast<const char* (*)()>(symbol(path, name))();
}

}  // namespace

PYBIND11_MODULE(_introspection, m) {
  m.doc() = "Build information of the compiled part of ghl_kernels.";
  m.attr("compiler") = GHL_COMPILER;
  m.attr("flags") = GHL_FLAGS;
  m.attr("torch_headers") = GHL_TORCH_HEADERS;
  m.attr("torch_target_version") = GHL_TORCH_TARGET;
  m.attr("source_hash") = GHL_SOURCE_HASH;
  // (kernel, architecture, registers, bytes of static shared memory, bytes spilled) of each
  m.attr("kernel_resources") = kernel_resources();
  m.def(
      "instruction_set",
      [](const std::string& path) { return text(path, "ghl_kernels_instruction_set"); },
      pybind11::arg("library"), "The instruction set whose CPU kernels run on this processor.");
  m.def(
      "use_instruction_set",
      [](const std::string& path, const std::string& name) {
        const auto use = reinterpret_cast<bool (*)(const char*)>(symbol(path, "ghl_kernels_use"));
        if (!use(name.c_str())) throw std::invalid_argument(name + " does not run here");
      },
      pybind11::arg("library"), pybind11::arg("name"),
      "Take the CPU kernels of that instruction set from now on: for tests and comparisons.");
}
