// Every schema of torch.ops.vtw_kernels.
//
// Semantics, shapes and errors: the docstrings of vtw_kernels/ops. Each device registers its kernels in one block of
// its own (cpu/compaction.cpp, cpu/kl_divergence.cpp); ops that are made of others have theirs in composite.cpp. So
// torch.ops.load_library is all that they need. What Python adds: gradients, fakes, batching rules, Triton, and the
// plain PyTorch of vtw_kernels/ops/reference.py for devices without a kernel.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vtw_kernels, m) {
  // Compaction. A length may be symbolic while a graph is traced; kernels are only ever called with numbers.
  m.def("plan_compaction(Tensor keep, SymInt length=-1, bool pad_left=False) -> (Tensor source, Tensor lengths)");
  m.def("compact(Tensor[] tensors, int[] token_dims, int[] batch_dims, Tensor source) -> Tensor[]");
  m.def("compact_(Tensor(a!)[] tensors, int[] token_dims, int[] batch_dims, Tensor source) -> ()");
  m.def("expand(Tensor[] tensors, int[] token_dims, int[] batch_dims, Tensor source, SymInt length) -> Tensor[]");
  m.def(
      "compact_paged_(Tensor(a!)[] caches, Tensor block_table, Tensor seq_lens, Tensor keep, str layout=\"NHD\") "
      "-> Tensor");
  m.def(
      "plan_packed_(Tensor(a!)[] plan, Tensor query_start, Tensor seq_lens, Tensor visual, Tensor visual_start, "
      "Tensor block_table, int block_size) -> ()");

  // KL divergence. kl_divergence and kl_state are the two halves of kl_divergence_with_state, which alone has kernels
  // and a gradient.
  m.def("kl_divergence(Tensor p_logits, Tensor q_logits, float temperature=1.0) -> Tensor");
  m.def("kl_state(Tensor p_logits, Tensor q_logits, float temperature=1.0) -> Tensor");
  m.def("merge_kl_states(Tensor[] states) -> Tensor");
  m.def("kl_from_state(Tensor state) -> Tensor");
  m.def("kl_divergence_with_state(Tensor p_logits, Tensor q_logits, float temperature) -> (Tensor kl, Tensor state)");
  m.def(
      "kl_divergence_backward(Tensor grad, Tensor p_logits, Tensor q_logits, Tensor state, float temperature, "
      "bool need_p, bool need_q) -> (Tensor grad_p, Tensor grad_q)");

  // As a loss: the gradient is computed with the divergence, and the backward scales it.
  m.def("kl_divergence_loss(Tensor p_logits, Tensor q_logits, float temperature=1.0, Tensor? weight=None) -> Tensor");
  m.def(
      "kl_divergence_with_gradients(Tensor p_logits, Tensor q_logits, Tensor? weight, float temperature, bool need_p, "
      "bool need_q) -> (Tensor kl, Tensor grad_p, Tensor grad_q)");
  m.def("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()");

  // KL divergence of two projections.
  m.def(
      "linear_kl_divergence(Tensor p_hidden, Tensor p_weight, Tensor q_hidden, Tensor q_weight, "
      "float temperature=1.0, *, Tensor? p_bias=None, Tensor? q_bias=None, SymInt? chunk=None) -> Tensor");
  m.def(
      "linear_kl_divergence_with_state(Tensor p_hidden, Tensor p_weight, Tensor? p_bias, Tensor q_hidden, "
      "Tensor q_weight, Tensor? q_bias, float temperature, SymInt? chunk) -> (Tensor kl, Tensor state)");
  m.def(
      "linear_kl_divergence_backward(Tensor grad_state, Tensor p_hidden, Tensor p_weight, Tensor? p_bias, "
      "Tensor q_hidden, Tensor q_weight, Tensor? q_bias, Tensor state, float temperature, SymInt? chunk, bool[] needs) "
      "-> Tensor[]");
}
