// A launch of a kernel that Triton compiled, again and for other tensors: its parameters are laid
// out once, and of a call only the addresses of its tensors are new.
//
// Triton's own way looks at every argument in Python, which takes longer than the driver's part.
// What a launch is made of is told by ghl_kernels/triton/launch.py; libcuda is looked for when the
// first is planned. Nothing here waits for the GPU.
#include "launches.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace {

constexpr int kMostRank = 5;
constexpr size_t kMostBytes = 4096;  // of a kernel's parameters

using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned shared_bytes, void* stream, void** parameters, void** extra);
using EncodeTiled = int (*)(void* map, int data_type, uint32_t rank, void* address,
                            const uint64_t* shape, const uint64_t* strides, const uint32_t* box,
                            const uint32_t* element_strides, int interleave, int swizzle,
                            int l2_promotion, int fill);
using ParamInfo = int (*)(void* function, size_t index, size_t* offset, size_t* size);
using GetContext = int (*)(void** context);
using ErrorString = int (*)(int error, const char** text);

struct Driver {
  Launch launch = nullptr;
  EncodeTiled encode_tiled = nullptr;
  ParamInfo param_info = nullptr;  // from CUDA 12.4 on
  GetContext context = nullptr;
  ErrorString error_string = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);
    if (!library) return;
    launch = reinterpret_cast<Launch>(dlsym(library, "cuLaunchKernel"));
    encode_tiled = reinterpret_cast<EncodeTiled>(dlsym(library, "cuTensorMapEncodeTiled"));
    param_info = reinterpret_cast<ParamInfo>(dlsym(library, "cuFuncGetParamInfo"));
    context = reinterpret_cast<GetContext>(dlsym(library, "cuCtxGetCurrent"));
    error_string = reinterpret_cast<ErrorString>(dlsym(library, "cuGetErrorString"));
  }

  bool ready() const {
    void* current = nullptr;
    return launch && encode_tiled && context && !context(&current) && current;
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace

extern "C" {

// One parameter, as ghl_kernels/tapes/launches.py has it. Numbers are bytes; an address is that of
// a tensor of the call plus an offset; a tensor map describes what lies at such an address, its
// dimensions from the innermost on.
struct GhlParameter {
  enum Kind : int32_t { kNumber, kAddress, kTensorMap };
  int32_t kind;
  int32_t tensor;
  int64_t offset;
  int32_t bytes;
  uint8_t number[8];
  int32_t data_type, rank, swizzle, fill;
  uint64_t shape[kMostRank], strides[kMostRank];
  uint32_t box[kMostRank];
};

struct GhlLaunch {
  void* function;
  uint32_t grid[3], threads, shared_bytes;
  int32_t parameters;
};
}

namespace {

struct Planned {
  GhlLaunch launch;
  std::vector<GhlParameter> parameters;
  std::vector<size_t> offsets;  // of each in the memory that the driver reads them from
};

constexpr size_t kMapBytes = 128, kMapAlignment = 128;  // 64 until CUDA 12

size_t size_of(const GhlParameter& p) {
  return p.kind == GhlParameter::kTensorMap ? kMapBytes
         : p.kind == GhlParameter::kAddress ? sizeof(uint64_t)
                                            : p.bytes;
}

// Whether these are the kernel's own parameters, as a driver from CUDA 12.4 on says: it would read
// more from behind their end.
bool fits(const Planned& plan) {
  const ParamInfo info = driver().param_info;
  if (!info) return false;
  size_t offset = 0, size = 0;
  for (size_t i = 0; i < plan.parameters.size(); ++i)
    if (info(plan.launch.function, i, &offset, &size) || size != size_of(plan.parameters[i]))
      return false;
  return info(plan.launch.function, plan.parameters.size(), &offset, &size) != 0;
}

int encode(const GhlParameter& p, uint64_t address, void* map) {
  static const uint32_t ones[kMostRank] = {1, 1, 1, 1, 1};
  constexpr int kNotInterleaved = 0, kL2Promotion128 = 2;
  return driver().encode_tiled(map, p.data_type, p.rank, reinterpret_cast<void*>(address), p.shape,
                               p.strides, p.box, ones, kNotInterleaved, p.swizzle, kL2Promotion128,
                               p.fill);
}

}  // namespace

GHL_EXPORT int ghl_launches_abi() {
  return GHL_ABI;
}

// A launch to be played, to be given back to ghl_launch_forget; null where its parameters are too
// many, or not the kernel's.
GHL_EXPORT void* ghl_launch_plan(const GhlLaunch* launch, const GhlParameter* parameters) {
  auto planned = std::make_unique<Planned>();
  planned->launch = *launch;
  planned->parameters.assign(parameters, parameters + launch->parameters);
  size_t end = 0;
  for (const GhlParameter& p : planned->parameters) {
    const bool map = p.kind == GhlParameter::kTensorMap;
    const size_t alignment = map ? kMapAlignment : sizeof(uint64_t);
    end = (end + alignment - 1) / alignment * alignment;
    planned->offsets.push_back(end);
    end += map ? kMapBytes : sizeof(uint64_t);
    if (p.rank < 0 || p.rank > kMostRank || p.bytes < 0 || p.bytes > int(sizeof p.number))
      return nullptr;
  }
  return end > kMostBytes || !fits(*planned) ? nullptr : planned.release();
}

GHL_EXPORT void ghl_launch_forget(void* planned) {
  delete static_cast<Planned*>(planned);
}

GHL_EXPORT int ghl_launch_play(const void* planned, void* stream, const uint64_t* addresses) {
  if (!driver().ready()) return kGhlLaunchUnavailable;
  const Planned& plan = *static_cast<const Planned*>(planned);
  alignas(kMapAlignment) unsigned char memory[kMostBytes];
  void* places[kMostBytes / sizeof(uint64_t)];
  for (size_t i = 0; i < plan.parameters.size(); ++i) {
    const GhlParameter& p = plan.parameters[i];
    places[i] = memory + plan.offsets[i];
    if (p.kind == GhlParameter::kNumber) {
      std::memcpy(places[i], p.number, sizeof p.number);
      continue;
    }
    const uint64_t address = addresses[p.tensor] + uint64_t(p.offset);
    if (p.kind == GhlParameter::kAddress) {
      std::memcpy(places[i], &address, sizeof address);
    } else if (const int error = encode(p, address, places[i])) {
      return error;
    }
  }
  const GhlLaunch& l = plan.launch;
  if (!l.grid[0] || !l.grid[1] || !l.grid[2]) return 0;
  return driver().launch(l.function, l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1,
                         l.shared_bytes, stream, places, nullptr);
}

GHL_EXPORT const char* ghl_launch_error(int error) {
  const char* text = nullptr;
  if (driver().error_string) driver().error_string(error, &text);
  return text ? text : "unknown";
}
