// A libcuda without a GPU: kernels load, launches write down what they were given, and a tensor map
// is what it was made of.
#include <stdint.h>
#include <string.h>

#include <vector>

namespace {

struct Written {
  std::vector<unsigned char> bytes;
  template <class T>
  void add(const T& value) {
    add(&value, sizeof value);
  }
  void add(const void* data, size_t size) {
    const auto* from = static_cast<const unsigned char*>(data);
    bytes.insert(bytes.end(), from, from + size);
  }
};

std::vector<size_t> sizes;  // of the next launches' parameters
std::vector<Written> launches;
bool has_context = true;

int write(const unsigned* grid_and_block, unsigned shared, void* stream, void* function,
          void** parameters) {
  Written w;
  for (int i = 0; i < 6; ++i) w.add(grid_and_block[i]);
  w.add(shared);
  w.add(stream);
  w.add(function);
  for (size_t i = 0; i < sizes.size(); ++i) w.add(parameters[i], sizes[i]);
  launches.push_back(w);
  return 0;
}

struct LaunchConfig {
  unsigned grid_and_block[6], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

}  // namespace

extern "C" {

// What tests ask.
void test_set_sizes(const size_t* given, int count) {
  sizes.assign(given, given + count);
}
void test_set_context(bool has) {
  has_context = has;
}
int test_launches() {
  return static_cast<int>(launches.size());
}
int test_launch(int i, unsigned char* bytes, int room) {
  const auto& found = launches[i].bytes;
  if (static_cast<int>(found.size()) <= room) memcpy(bytes, found.data(), found.size());
  return static_cast<int>(found.size());
}

// What Triton and csrc/launches ask.
int cuCtxGetCurrent(void** context) {
  *context = has_context ? &sizes : nullptr;
  return 0;
}
int cuCtxSetCurrent(void*) {
  return 0;
}
int cuCtxGetDevice(int* device) {
  return *device = 0;
}
int cuCtxGetLimit(size_t* size, int) {
  *size = 1 << 20;
  return 0;
}
int cuCtxSetLimit(int, size_t) {
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGet(int* device, int) {
  return *device = 0;
}
int cuDeviceGetAttribute(int* value, int, int) {
  *value = 232448;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &sizes;
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {  // asked by Triton 3.9 on
  return *status = 0;
}
int cuFuncGetAttribute(int* value, int, void*) {
  *value = 1024;
  return 0;
}
int cuFuncSetAttribute(void*, int, int) {
  return 0;
}
int cuFuncSetCacheConfig(void*, int) {
  return 0;
}
int cuFuncGetParamInfo(void*, size_t index, size_t* offset, size_t* size) {
  if (index >= sizes.size()) return 1;
  *offset = 0;
  *size = sizes[index];
  return 0;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == 7 ? "seven" : "another";
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char*) {
  *function = module;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = const_cast<void*>(image);
  return 0;
}
int cuModuleUnload(void*) {
  return 0;
}
int cuOccupancyMaxActiveClusters(int* count, void*, void*) {
  *count = 1;
  return 0;
}
int cuPointerGetAttribute(void* value, int, uint64_t address) {
  memcpy(value, &address, sizeof address);
  return 0;
}
int cuTensorMapEncodeTiled(void* map, int data_type, uint32_t rank, void* address,
                           const uint64_t* shape, const uint64_t* strides, const uint32_t* box,
                           const uint32_t* element_strides, int interleave, int swizzle,
                           int l2_promotion, int fill) {
  if (rank == 1) return 7;  // an error of the driver, to see one
  Written w;
  w.add(address);
  for (int value : {data_type, int(rank), interleave, swizzle, l2_promotion, fill}) w.add(value);
  for (uint32_t i = 0; i < rank; ++i) {
    w.add(shape[i]);
    if (i + 1 < rank) w.add(strides[i]);  // the driver reads no more of them
    w.add(static_cast<unsigned short>(box[i] << 4 | element_strides[i]));
  }
  w.bytes.resize(128);
  memcpy(map, w.bytes.data(), 128);
  return 0;
}
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** parameters, void**) {
  return write(config->grid_and_block, config->shared, config->stream, function, parameters);
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                   void** parameters, void**) {
  const unsigned all[] = {x, y, z, threads, threads_y, threads_z};
  return write(all, shared, stream, function, parameters);
}
}
