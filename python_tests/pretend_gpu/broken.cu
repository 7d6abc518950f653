// A launch, right or wrong on purpose, each wrong one in a way that the pretend GPU must see (test_pretend_gpu.py).
// nvcc compiles it for the host's half, and g++ for the twin.

#include "cuda/launch.cuh"

namespace broken {

__global__ void add_one(int* x, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) x[i] += 1;
}

}  // namespace broken

#ifdef __CUDACC__
// To the current device unless `device` is one. Returns what the runtime says.
extern "C" __attribute__((visibility("default"))) const char* add_one(int* x, int count, unsigned blocks, void* stream,
                                                                      int device) {
  if (device >= 0) cudaSetDevice(device);
  try {
    vtw::launch(broken::add_one, blocks, 64, static_cast<cudaStream_t>(stream), x, count);
  } catch (const std::exception& error) {
    static std::string text;
    return (text = error.what()).c_str();
  }
  return "";
}
#endif
