// The CUDA backend on the host: csrc/cuda as it stands, kernels and bindings, registered for CPU tensors in a library
// of its own. Python defines the schemas (conftest.py).

#include "cuda/compaction.cu"

STABLE_TORCH_LIBRARY_IMPL(vtw_simt, CPU, m) {
  m.impl("plan_compaction", TORCH_BOX(&vtw::cuda::plan_compaction));
  m.impl("compact", TORCH_BOX(&vtw::cuda::compact));
  m.impl("compact_", TORCH_BOX(&vtw::cuda::compact_));
  m.impl("expand", TORCH_BOX(&vtw::cuda::expand));
  m.impl("compact_paged_", TORCH_BOX(&vtw::cuda::compact_paged_));
}
