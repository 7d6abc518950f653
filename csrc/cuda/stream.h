// The device of a tensor, and the stream that torch is working on there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.cuh"

#ifdef __CUDACC__
#include <dlfcn.h>

#include <stdexcept>
#include <string>
#endif

namespace vtw::cuda {

#ifdef __CUDACC__
// aoti_torch_get_current_cuda_stream is the one function that we need from libtorch_cuda. The extension is not linked
// to that library, so that it also loads under a torch without CUDA; and a weak symbol would not find it, as torch
// loads the library privately. So it is looked up here; where there is a CUDA tensor, the library is loaded.
inline cudaStream_t current_stream(int32_t device) {
  static const auto get = [] {
    const char* const name = "aoti_torch_get_current_cuda_stream";
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol = library ? dlsym(library, name) : nullptr;
    if (!symbol) {
      throw std::runtime_error(std::string("vtw_kernels: torch's CUDA library: expected libtorch_cuda.so with ") +
                               name + ", got " + (library ? "one without it" : "none that is loaded"));
    }
    return reinterpret_cast<AOTITorchError (*)(int32_t, void**)>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes a tensor's device the current one while it lives.
class OnDeviceOf {
  const torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cudaStream_t stream;

  explicit OnDeviceOf(const torch::stable::Tensor& x)
      : guard_(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
};
#else
struct OnDeviceOf {
  const cudaStream_t stream = nullptr;

  explicit OnDeviceOf(const torch::stable::Tensor&) {}
};
#endif

}  // namespace vtw::cuda
