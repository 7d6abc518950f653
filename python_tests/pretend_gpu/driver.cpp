// A pretend libcuda.so.1: the little that torch asks of the driver itself, by way of libcaffe2_nvrtc.so, which is
// loaded with all of its symbols at once. A context is its device's number, plus 1.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" {
#pragma GCC visibility push(default)

int cudaGetDevice(int* device);
int cudaSetDevice(int device);

int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(uintptr_t* context, int device) { return *context = device + 1, 0; }
int cuCtxGetCurrent(uintptr_t* context) {
  int device;
  cudaGetDevice(&device);
  return cuDevicePrimaryCtxRetain(context, device);
}
int cuCtxSetCurrent(uintptr_t context) { return cudaSetDevice(static_cast<int>(context) - 1); }
int cuGetErrorString(int, const char** text) { return *text = "pretend CUDA driver error", 0; }

#define NOT_THERE(name)                                            \
  void name() {                                                    \
    std::fprintf(stderr, "pretend CUDA: there is no " #name "\n"); \
    std::abort();                                                  \
  }
NOT_THERE(cuDeviceGetAttribute)
NOT_THERE(cuFuncGetAttribute)
NOT_THERE(cuFuncSetAttribute)
NOT_THERE(cuFuncSetCacheConfig)
NOT_THERE(cuLaunchCooperativeKernel)
NOT_THERE(cuLaunchKernel)
NOT_THERE(cuLinkAddData_v2)
NOT_THERE(cuLinkComplete)
NOT_THERE(cuLinkCreate_v2)
NOT_THERE(cuModuleGetFunction)
NOT_THERE(cuModuleLoad)
NOT_THERE(cuModuleLoadData)
NOT_THERE(cuModuleLoadDataEx)
NOT_THERE(cuModuleUnload)
NOT_THERE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_THERE(cuPointerGetAttribute)
NOT_THERE(cuTensorMapEncodeTiled)

#pragma GCC visibility pop
}
