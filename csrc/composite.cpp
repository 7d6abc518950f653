// Ops that only call other ops, for every device: which backend does the work is decided where those are called. Python
// replaces these kernels by its own (vtw_kernels/ops/_registration.py says why); they serve programs without it.

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "checks.h"

namespace vtw {
namespace {

// The results of an op, called through the dispatcher.
template <int results, typename... Args>
auto call(const char* op, const char* overload, const Args&... args) {
  constexpr size_t kCount = sizeof...(Args) > results ? sizeof...(Args) : results;
  std::array<StableIValue, kCount> stack{torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, results> tensors;
  for (int i = 0; i < results; ++i) tensors[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return tensors;
}

Tensor to_dtype(const Tensor& x, ScalarType dtype) { return torch::stable::to(x, dtype); }

// Checked here, because the text of an error is lost on the way back from an op that is called by name.
std::array<Tensor, 2> kl_divergence_with_state(const Tensor& p_logits, const Tensor& q_logits, double temperature) {
  check_logits("kl_divergence", p_logits, q_logits, temperature);
  return call<2>("vtw_kernels::kl_divergence_with_state", "", p_logits, q_logits, temperature);
}

Tensor kl_divergence(const Tensor& p_logits, const Tensor& q_logits, double temperature) {
  return kl_divergence_with_state(p_logits, q_logits, temperature)[0];
}

Tensor kl_state(const Tensor& p_logits, const Tensor& q_logits, double temperature) {
  return kl_divergence_with_state(p_logits, q_logits, temperature)[1];
}

Tensor kl_divergence_loss(const Tensor& p_logits, const Tensor& q_logits, double temperature,
                          const std::optional<Tensor>& weight) {
  const char* op = "kl_divergence_loss";
  check_logits(op, p_logits, q_logits, temperature);
  if (weight) check_row_states("weight", *weight, broadcast_rows(p_logits, q_logits), p_logits, op);
  const Tensor kl = kl_divergence(p_logits, q_logits, temperature);
  if (!weight) return call<1>("aten::mean", "", kl, std::optional<ScalarType>())[0];
  // A row of weight 0 adds nothing, whatever its divergence is.
  Tensor zero = allocate(*weight, {});
  torch::stable::zero_(zero);
  const Tensor none = call<1>("aten::eq", "Tensor", *weight, zero)[0];
  const Tensor weighted = call<1>("aten::mul", "Tensor", kl, *weight)[0];
  const Tensor terms = call<1>("aten::where", "self", none, zero, weighted)[0];
  return call<1>("aten::sum", "", terms, std::optional<ScalarType>())[0];
}

// --- projections -----------------------------------------------------------------------------------------------------

// As in vtw_kernels/ops/linear_kl_divergence.py, which says why.
constexpr int64_t kLogitsBytes = 64 * 1024 * 1024;
constexpr int64_t kChunkStep = 1024;

struct Projection {
  Tensor hidden, weight;
  std::optional<Tensor> bias;

  Tensor logits(int64_t begin, int64_t count) {
    std::optional<Tensor> part;
    if (bias) part = torch::stable::narrow(*bias, 0, begin, count);
    return call<1>("aten::linear", "", hidden, torch::stable::narrow(weight, 0, begin, count), part)[0];
  }
};

void check_projection(const std::string& side, const Projection& x, const Projection& p) {
  const char* op = "linear_kl_divergence";
  const auto dtype = p.hidden.scalar_type();
  const auto same = [&](const char* name, const Tensor& tensor) {
    VTW_REQUIRE(tensor.scalar_type() == dtype, op, side + name, text("dtype ", dtype_name(dtype), " of p_hidden"),
                dtype_name(tensor.scalar_type()));
    VTW_REQUIRE(tensor.device() == p.hidden.device(), op, side + name, "the device of p_hidden", "another one");
  };
  same("_hidden", x.hidden);
  same("_weight", x.weight);
  if (x.bias) same("_bias", *x.bias);
  VTW_REQUIRE(x.hidden.dim() >= 1, op, side + "_hidden", text("at least 1 dimension [..., H_", side, "]"), "a scalar");
  const int64_t size = x.hidden.size(x.hidden.dim() - 1), vocabulary = p.weight.size(0);
  VTW_REQUIRE(x.weight.dim() == 2 && x.weight.size(1) == size, op, side + "_weight",
              text("shape [V, ", size, "] by ", side, "_hidden"), shape_text(x.weight));
  VTW_REQUIRE(x.weight.size(0) == vocabulary, op, side + "_weight",
              text("vocabulary size ", vocabulary, " of p_weight"), text(x.weight.size(0)));
  if (x.bias) {
    VTW_REQUIRE(x.bias->dim() == 1 && x.bias->size(0) == vocabulary, op, side + "_bias",
                text("shape [", vocabulary, "] by ", side, "_weight"), shape_text(*x.bias));
  }
}

std::tuple<Tensor, Tensor> linear_kl_divergence_with_state(const Tensor& p_hidden, const Tensor& p_weight,
                                                           const std::optional<Tensor>& p_bias, const Tensor& q_hidden,
                                                           const Tensor& q_weight, const std::optional<Tensor>& q_bias,
                                                           double temperature, std::optional<int64_t> chunk) {
  const char* op = "linear_kl_divergence";
  Projection p{p_hidden, p_weight, p_bias}, q{q_hidden, q_weight, q_bias};
  const auto dtype = p_hidden.scalar_type();
  VTW_REQUIRE(is_floating(dtype), op, "p_hidden", "a dtype of fp32, fp16, bf16 or fp64", dtype_name(dtype));
  check_projection("p", p, p);
  check_projection("q", q, p);
  check_rows(op, "hidden", p_hidden, q_hidden);
  check_temperature(op, temperature);
  VTW_REQUIRE(!chunk || *chunk >= 1, op, "chunk", "at least 1 entry of the vocabulary, or None", text(*chunk));

  int64_t rows = 1;
  for (const int64_t size : broadcast_rows(p_hidden, q_hidden)) rows *= size;
  const int64_t entry_bytes = 2 * std::max<int64_t>(1, rows) * static_cast<int64_t>(p_hidden.element_size());
  const int64_t step = chunk.value_or(std::max<int64_t>(1, kLogitsBytes / (entry_bytes * kChunkStep)) * kChunkStep);
  // From the state of an empty shard on; in fp64, so that many chunks round no more often than one.
  Tensor state =
      to_dtype(kl_state(torch::stable::narrow(p.hidden, -1, 0, 0), torch::stable::narrow(q.hidden, -1, 0, 0), 1.0),
               ScalarType::Double);
  for (int64_t begin = 0; begin < p_weight.size(0); begin += step) {
    const int64_t count = std::min(step, p_weight.size(0) - begin);
    const Tensor p_logits = p.logits(begin, count), q_logits = q.logits(begin, count);
    const Tensor part = kl_state(p_logits, q_logits, temperature);
    const std::vector<Tensor> states{state, to_dtype(part, ScalarType::Double)};
    state = call<1>("vtw_kernels::merge_kl_states", "", states)[0];
  }
  const Tensor kl = call<1>("vtw_kernels::kl_from_state", "", state)[0];
  return {to_dtype(kl, real_type(dtype)), to_dtype(state, real_type(dtype))};
}

Tensor linear_kl_divergence(const Tensor& p_hidden, const Tensor& p_weight, const Tensor& q_hidden,
                            const Tensor& q_weight, double temperature, const std::optional<Tensor>& p_bias,
                            const std::optional<Tensor>& q_bias, std::optional<int64_t> chunk) {
  return std::get<0>(
      linear_kl_divergence_with_state(p_hidden, p_weight, p_bias, q_hidden, q_weight, q_bias, temperature, chunk));
}

}  // namespace
}  // namespace vtw

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CompositeImplicitAutograd, m) {
  m.impl("kl_divergence", TORCH_BOX(&vtw::kl_divergence));
  m.impl("kl_state", TORCH_BOX(&vtw::kl_state));
  m.impl("linear_kl_divergence", TORCH_BOX(&vtw::linear_kl_divergence));
}

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CompositeExplicitAutograd, m) {
  m.impl("kl_divergence_loss", TORCH_BOX(&vtw::kl_divergence_loss));
  m.impl("linear_kl_divergence_with_state", TORCH_BOX(&vtw::linear_kl_divergence_with_state));
}
