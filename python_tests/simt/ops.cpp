// The CUDA backend on the host: csrc/cuda as it stands, kernels and bindings, registered for CPU tensors in a library
// of its own. Python defines the schemas (conftest.py).

#include "cuda/compaction.cu"
#include "cuda/kl_divergence.cu"

STABLE_TORCH_LIBRARY_IMPL(vtw_simt, CPU, m) {
  m.impl("plan_compaction", TORCH_BOX(&vtw::cuda::plan_compaction));
  m.impl("compact", TORCH_BOX(&vtw::cuda::compact));
  m.impl("compact_", TORCH_BOX(&vtw::cuda::compact_));
  m.impl("expand", TORCH_BOX(&vtw::cuda::expand));
  m.impl("compact_paged_", TORCH_BOX(&vtw::cuda::compact_paged_));
  m.impl("plan_packed_", TORCH_BOX(&vtw::cuda::plan_packed_));
  m.impl("kl_divergence_with_state", TORCH_BOX(&vtw::cuda::kl_divergence_with_state));
  m.impl("kl_divergence_backward", TORCH_BOX(&vtw::cuda::kl_divergence_backward));
  m.impl("kl_divergence_with_gradients", TORCH_BOX(&vtw::cuda::kl_divergence_with_gradients));
  m.impl("scale_", TORCH_BOX(&vtw::cuda::scale_));
  m.impl("merge_kl_states", TORCH_BOX(&vtw::cuda::merge_kl_states));
  m.impl("kl_from_state", TORCH_BOX(&vtw::cuda::kl_from_state));
}
