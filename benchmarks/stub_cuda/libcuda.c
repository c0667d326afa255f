// A libcuda.so.1 whose calls all succeed and do nothing: Triton compiles and launches for an H100 that is not there, so
// that the host's share of a launch can be timed. What a kernel would write stays as it was.
#include <stddef.h>
#include <stdint.h>

static int context;

static int attribute(int name) {
  switch (name) {
    case 8: return 49152;     // shared memory of a block without asking
    case 10: return 32;       // threads of a warp
    case 12: return 65536;    // registers of a block
    case 13: return 1980000;  // kHz
    case 16: return 132;      // multiprocessors
    case 36: return 2619000;  // kHz of the memory
    case 37: return 5120;     // bits of its bus
    case 75: return 9;        // compute capability
    case 76: return 0;
    case 81: return 233472;  // shared memory of a multiprocessor
    case 82: return 65536;   // its registers
    case 97: return 232448;  // shared memory of a block that asks
    default: return 1;
  }
}

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int index) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int name, int device) { return *value = attribute(name), 0; }
int cuDevicePrimaryCtxRetain(void** out, int device) { return *out = &context, 0; }
int cuCtxGetCurrent(void** out) { return *out = &context, 0; }
int cuCtxSetCurrent(void* current) { return 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int name) { return *value = 1 << 20, 0; }
int cuCtxSetLimit(int name, size_t value) { return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamSynchronize(void* stream) { return 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = &context, 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &context, 0; }
int cuFuncGetAttribute(int* value, int name, void* function) { return *value = name == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int name, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuPointerGetAttribute(void* data, int name, uint64_t pointer) { return *(uint64_t*)data = pointer, 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }
int cuTensorMapEncodeTiled(void* map) { return 0; }
int cuTensorMapEncodeIm2col(void* map) { return 0; }
int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) { return *pointer = 4096, 0; }
int cuMemFree_v2(uint64_t pointer) { return 0; }
int cuGetErrorString(int error, const char** text) { return *text = "", 0; }
int cuLaunchKernelEx(const void* config, void* function, void** arguments, void** extra) { return 0; }
int cuLaunchKernel(
    void* function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y, unsigned threads_z,
    unsigned shared, void* stream, void** arguments, void** extra) {
  return 0;
}
