// The stream that torch is working on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.cuh"

// Not in a torch without CUDA: weak, so that an extension with CUDA kernels loads there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vtw::cuda {

// Makes a tensor's device the current one while it lives.
class OnDeviceOf {
 public:
  cudaStream_t stream = nullptr;

#ifdef __CUDACC__
  explicit OnDeviceOf(const torch::stable::Tensor& x) {
    cudaGetDevice(&before_);
    const int device = x.get_device_index();
    if (device != before_) cudaSetDevice(device);
    void* current = nullptr;
    aoti_torch_get_current_cuda_stream(device, &current);
    stream = static_cast<cudaStream_t>(current);
  }
  ~OnDeviceOf() { cudaSetDevice(before_); }
  OnDeviceOf(const OnDeviceOf&) = delete;

 private:
  int before_ = 0;
#else
  explicit OnDeviceOf(const torch::stable::Tensor&) {}
#endif
};

}  // namespace vtw::cuda
