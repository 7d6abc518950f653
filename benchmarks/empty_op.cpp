// Ops of the signatures of compact and compact_ that do nothing: what a call costs before any work is done.

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;
using Dims = std::vector<int64_t>;

std::vector<Tensor> compact(const std::vector<Tensor>&, const Dims&, const Dims&, const Tensor&) { return {}; }

void compact_(const std::vector<Tensor>&, const Dims&, const Dims&, const Tensor&) {}

}  // namespace

STABLE_TORCH_LIBRARY(vtw_kernels_empty, m) {
  m.def("compact(Tensor[] tensors, int[] token_dims, int[] batch_dims, Tensor source) -> Tensor[]");
  m.def("compact_(Tensor(a!)[] tensors, int[] token_dims, int[] batch_dims, Tensor source) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels_empty, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_", TORCH_BOX(&compact_));
}

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels_empty, CUDA, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_", TORCH_BOX(&compact_));
}
