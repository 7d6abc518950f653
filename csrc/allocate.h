// New tensors, through the C function itself: torch's stable new_empty looks its operator up by name in each call,
// which costs more than small ops do.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace vtw {

// What is as large as this, glibc's malloc asks the kernel for anew in each call, and most of the time of writing it is
// then that of the page faults: 10 ms for 40 MB where the writes take 1. Huge pages take 3.
constexpr int64_t kMappedBytes = 32 * 1024 * 1024;

inline void want_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish; it may fail
#endif
}

// Contiguous and uninitialised, on the device of `like`, and of its dtype unless another one is given.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                      std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= shape[d] > 1 ? shape[d] : 1;
  }
  int32_t dtype_code, device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    dtype_code = static_cast<int32_t>(*dtype);
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype_code));
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype_code, device_type, device_index,
                                                         &handle));
  torch::stable::Tensor result(handle);
  if (device_type == aoti_torch_device_type_cpu()) {
    const int64_t bytes = result.numel() * static_cast<int64_t>(result.element_size());
    if (bytes >= kMappedBytes) want_huge_pages(result.mutable_data_ptr(), bytes);
  }
  return result;
}

}  // namespace vtw
