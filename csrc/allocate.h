// New tensors, through the C function itself: torch's stable new_empty looks its operator up by name in each call,
// which costs more than small ops do.
#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "checks.h"

namespace vtw {

// Contiguous and uninitialised, on the device of `like`, and of its dtype unless another one is given. Torch's own
// error does not come through its C interface, so this one says how much was asked for.
inline torch::stable::Tensor allocate(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                      std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    if (__builtin_mul_overflow(stride, shape[d] > 1 ? shape[d] : 1, &stride)) stride = INT64_MAX;  // so that it fails
  }
  int32_t dtype_code, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  if (dtype) {
    dtype_code = static_cast<int32_t>(*dtype);
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype_code));
  }
  AtenTensorHandle handle;
  const auto failed = aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                               dtype_code, device_type, device_index, &handle);
  if (failed) {
    using torch::headeronly::ScalarType;  // if it is not that of `like`, it is fp64, fp32 or int32
    double gibibytes = (!dtype ? like.element_size() : *dtype == ScalarType::Double ? 8 : 4) / 0x1p30;
    for (const int64_t size : shape) gibibytes *= static_cast<double>(size);
    throw std::runtime_error(text("out of memory: expected room for ", gibibytes, " GiB, a result of shape ",
                                  list_text(shape), ", got none"));
  }
  return torch::stable::Tensor(handle);
}

}  // namespace vtw
