// Argument checks shared by all compiled backends; vtw_kernels/ops/checks.py is their Python half.
//
// Every failure reads "op: argument: expected WANTED, got GIVEN" and is thrown before anything is written.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace vtw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return out.str();
}

[[noreturn]] inline void fail(const std::string& op, const std::string& argument, const std::string& wanted,
                              const std::string& given) {
  throw std::runtime_error(op + ": " + argument + ": expected " + wanted + ", got " + given);
}

// A macro, so that the texts are only made when the check fails.
#define VTW_REQUIRE(condition, op, argument, wanted, given)     \
  do {                                                          \
    if (!(condition)) ::vtw::fail(op, argument, wanted, given); \
  } while (0)

inline std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Bool: return "torch.bool";
    default: return torch::headeronly::toString(dtype);
  }
}

template <typename List>
std::string list_text(const List& values) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << "]";
  return out.str();
}

inline std::string shape_text(const Tensor& x) { return "shape " + list_text(x.sizes()); }

// VTW_KERNELS_BACKEND, when set, is the only backend that registers its kernels.
inline bool backend_enabled(const char* name) {
  const char* forced = std::getenv("VTW_KERNELS_BACKEND");
  return forced == nullptr || *forced == '\0' || std::strcmp(forced, name) == 0;
}

inline void check_keep(const Tensor& keep, int64_t length) {
  const char* op = "plan_compaction";
  VTW_REQUIRE(keep.scalar_type() == ScalarType::Bool, op, "keep", "dtype bool", dtype_name(keep.scalar_type()));
  VTW_REQUIRE(keep.dim() == 2, op, "keep", "2 dimensions [B, S]", shape_text(keep));
  VTW_REQUIRE(length >= -1, op, "length", "a number of rows, or -1 for all of S", text(length));
}

struct TokenDims {
  int64_t token;
  int64_t batch;
};

enum class Op { kCompact, kCompactInPlace, kExpand };

inline const char* op_name(Op op) {
  return op == Op::kCompact ? "compact" : op == Op::kCompactInPlace ? "compact_" : "expand";
}

// One list against one plan; returns each tensor's dimensions, counted from the front.
inline std::vector<TokenDims> check_tensors(Op which, const std::vector<Tensor>& tensors,
                                            const std::vector<int64_t>& token_dims,
                                            const std::vector<int64_t>& batch_dims, const Tensor& source) {
  const char* op = op_name(which);
  VTW_REQUIRE(source.scalar_type() == ScalarType::Int, op, "source", "dtype int32", dtype_name(source.scalar_type()));
  VTW_REQUIRE(source.dim() == 2, op, "source", "2 dimensions [B, T]", shape_text(source));
  const int64_t batch = source.size(0);
  const int64_t kept = source.size(1);
  const auto one_each = [&](const char* name, const std::vector<int64_t>& dims) {
    VTW_REQUIRE(dims.size() == tensors.size(), op, name, text("one entry for each of the ", tensors.size(), " tensors"),
                text(dims.size()));
  };
  one_each("token_dims", token_dims);
  one_each("batch_dims", batch_dims);

  const auto device = source.device();
  std::vector<TokenDims> resolved(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const auto sizes = x.sizes();
    const int64_t rank = static_cast<int64_t>(sizes.size());
    const auto argument = [&](const char* name) { return text(name, "[", i, "]"); };
    VTW_REQUIRE(x.device() == device, op, argument("tensors"), "the device of source", "another one");
    VTW_REQUIRE(rank >= 2, op, argument("tensors"), "a batch and a token dimension", shape_text(x));
    const auto in_range = [&](const char* name, int64_t dim) {
      VTW_REQUIRE(-rank <= dim && dim < rank, op, argument(name), text("a dimension in [", -rank, ", ", rank - 1, "]"),
                  text(dim));
      return dim < 0 ? dim + rank : dim;
    };
    const int64_t token = in_range("token_dims", token_dims[i]);
    const int64_t batched = in_range("batch_dims", batch_dims[i]);
    VTW_REQUIRE(token != batched, op, argument("batch_dims"), text("another dimension than token_dims[", i, "]"),
                text(batched));
    const int64_t rows = sizes[batched];
    if (which == Op::kCompactInPlace) {
      VTW_REQUIRE(rows == batch, op, argument("tensors"), text("batch size ", batch, " of source"), text(rows));
    } else {
      VTW_REQUIRE(rows == 1 || rows == batch, op, argument("tensors"), text("batch size 1 or ", batch, " of source"),
                  text(rows));
    }
    if (which == Op::kExpand) {
      VTW_REQUIRE(sizes[token] == kept, op, argument("tensors"), text(kept, " rows of source in dimension ", token),
                  text(sizes[token]));
    }
    resolved[i] = {token, batched};
  }
  return resolved;
}

inline void check_paged(const std::vector<Tensor>& caches, const Tensor& block_table, const Tensor& seq_lens,
                        const Tensor& keep, const std::string& layout) {
  const char* op = "compact_paged_";
  VTW_REQUIRE(keep.scalar_type() == ScalarType::Bool, op, "keep", "dtype bool", dtype_name(keep.scalar_type()));
  VTW_REQUIRE(keep.dim() == 2, op, "keep", "2 dimensions [B, S]", shape_text(keep));
  const int64_t batch = keep.size(0);
  const auto integers = [&](const char* name, const Tensor& x, bool fits, const std::string& wanted) {
    VTW_REQUIRE(x.scalar_type() == ScalarType::Int, op, name, "dtype int32", dtype_name(x.scalar_type()));
    VTW_REQUIRE(fits, op, name, wanted, shape_text(x));
    VTW_REQUIRE(x.device() == keep.device(), op, name, "the device of keep", "another one");
  };
  integers("block_table", block_table, block_table.dim() == 2 && block_table.size(0) == batch,
           text("shape [", batch, ", pages]"));
  integers("seq_lens", seq_lens, seq_lens.dim() == 1 && seq_lens.size(0) == batch, text("shape [", batch, "]"));
  VTW_REQUIRE(layout == "NHD" || layout == "HND", op, "layout", "NHD or HND", layout);
  const int64_t slots = layout == "NHD" ? 1 : 2;
  for (size_t i = 0; i < caches.size(); ++i) {
    const auto argument = [&] { return text("caches[", i, "]"); };
    VTW_REQUIRE(caches[i].dim() == 4, op, argument(), text("4 dimensions in the order ", layout, " behind the pages"),
                shape_text(caches[i]));
    const bool same = caches[i].size(0) == caches[0].size(0) && caches[i].size(slots) == caches[0].size(slots);
    VTW_REQUIRE(same, op, argument(),
                text("the ", caches[0].size(0), " pages of ", caches[0].size(slots), " slots of caches[0]"),
                shape_text(caches[i]));
    VTW_REQUIRE(caches[i].size(slots) > 0, op, argument(), "pages of at least 1 slot", shape_text(caches[i]));
    VTW_REQUIRE(caches[i].device() == keep.device(), op, argument(), "the device of keep", "another one");
  }
}

// Packed rows: what goes in, and the four tensors that are written, in the order of the schema.
inline void check_packed(const std::vector<Tensor>& plan, const Tensor& query_start, const Tensor& seq_lens,
                         const Tensor& visual, const Tensor& visual_start, const Tensor& block_table,
                         int64_t block_size) {
  const char* op = "plan_packed_";
  VTW_REQUIRE(plan.size() == 4, op, "plan", "4 tensors: source, query_start, seq_lens and slots", text(plan.size()));
  const auto integers = [&](const std::string& name, const Tensor& x, ScalarType dtype, bool fits,
                            const std::string& wanted) {
    VTW_REQUIRE(x.scalar_type() == dtype, op, name, text("dtype ", dtype_name(dtype)), dtype_name(x.scalar_type()));
    VTW_REQUIRE(fits, op, name, wanted, shape_text(x));
    VTW_REQUIRE(x.device() == query_start.device(), op, name, "the device of query_start", "another one");
  };
  const auto list = [&](const std::string& name, const Tensor& x, ScalarType dtype, int64_t size) {
    integers(name, x, dtype, x.dim() == 1 && (size < 0 || x.size(0) == size),
             size < 0 ? std::string("1 dimension") : text("shape [", size, "]"));
    VTW_REQUIRE(x.is_contiguous(), op, name, "contiguous memory", text("strides ", list_text(x.strides())));
  };
  list("query_start", query_start, ScalarType::Int, -1);
  VTW_REQUIRE(query_start.size(0) > 0, op, "query_start", "shape [B + 1]", shape_text(query_start));
  const int64_t batch = query_start.size(0) - 1;
  list("seq_lens", seq_lens, ScalarType::Int, batch);
  integers("visual", visual, ScalarType::Int, visual.dim() == 2 && visual.size(1) == 2, "shape [R, 2]");
  VTW_REQUIRE(visual.is_contiguous(), op, "visual", "contiguous memory", text("strides ", list_text(visual.strides())));
  list("visual_start", visual_start, ScalarType::Int, batch + 1);
  integers("block_table", block_table, ScalarType::Int, block_table.dim() == 2 && block_table.size(0) == batch,
           text("shape [", batch, ", blocks]"));
  VTW_REQUIRE(0 < block_size && block_size <= INT32_MAX, op, "block_size", "at least 1", text(block_size));
  list("plan[0]", plan[0], ScalarType::Int, -1);
  list("plan[1]", plan[1], ScalarType::Int, batch + 1);
  list("plan[2]", plan[2], ScalarType::Int, batch);
  list("plan[3]", plan[3], ScalarType::Long, plan[0].size(0));
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Double;
}

// Leading dimensions, that of the vocabulary left out: they broadcast, and to what.
inline void check_rows(const char* op, const char* name, const Tensor& p, const Tensor& q) {
  for (int64_t i = p.dim() - 2, j = q.dim() - 2; i >= 0 && j >= 0; --i, --j) {
    VTW_REQUIRE(p.size(i) == q.size(j) || p.size(i) == 1 || q.size(j) == 1, op, text("q_", name),
                text("leading dimensions that broadcast with p_", name),
                text("shapes ", list_text(p.sizes()), " and ", list_text(q.sizes())));
  }
}

inline std::vector<int64_t> broadcast_rows(const Tensor& p, const Tensor& q) {
  const Tensor& longer = p.dim() >= q.dim() ? p : q;
  const Tensor& shorter = p.dim() >= q.dim() ? q : p;
  std::vector<int64_t> rows(longer.sizes().begin(), longer.sizes().end() - 1);
  for (int64_t i = shorter.dim() - 2, j = longer.dim() - 2; i >= 0; --i, --j) {
    if (rows[j] == 1) rows[j] = shorter.size(i);
  }
  return rows;
}

inline void check_temperature(const char* op, double temperature) {
  using Fp32 = std::numeric_limits<float>;
  VTW_REQUIRE(temperature >= Fp32::min() && temperature <= Fp32::max(), op, "temperature",
              "a number above 0, from 1.2e-38 to 3.4e38 as fp32 has it", text(temperature));
}

inline void check_logits(const char* op, const Tensor& p, const Tensor& q, double temperature) {
  const auto dtype = p.scalar_type();
  VTW_REQUIRE(is_floating(dtype), op, "p_logits", "a dtype of fp32, fp16, bf16 or fp64", dtype_name(dtype));
  VTW_REQUIRE(q.scalar_type() == dtype, op, "q_logits", text("dtype ", dtype_name(dtype), " of p_logits"),
              dtype_name(q.scalar_type()));
  VTW_REQUIRE(q.device() == p.device(), op, "q_logits", "the device of p_logits", "another one");
  VTW_REQUIRE(p.dim() >= 1, op, "p_logits", "at least 1 dimension [..., V]", "a scalar");
  VTW_REQUIRE(q.dim() >= 1, op, "q_logits", "at least 1 dimension [..., V]", "a scalar");
  const int64_t vocabulary = p.size(p.dim() - 1);
  VTW_REQUIRE(q.size(q.dim() - 1) == vocabulary, op, "q_logits", text("vocabulary size ", vocabulary, " of p_logits"),
              text(q.size(q.dim() - 1)));
  check_rows(op, "logits", p, q);
  check_temperature(op, temperature);
}

// A state or its gradient, in the backward of kl_divergence: of the type that the logits are computed in.
inline ScalarType real_type(ScalarType logits) {
  return logits == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_row_states(const char* argument, const Tensor& x, const std::vector<int64_t>& shape,
                             const Tensor& logits, const char* op = "kl_divergence_backward") {
  const auto dtype = real_type(logits.scalar_type());
  VTW_REQUIRE(x.scalar_type() == dtype, op, argument, text("dtype ", dtype_name(dtype)), dtype_name(x.scalar_type()));
  VTW_REQUIRE(x.device() == logits.device(), op, argument, "the device of p_logits", "another one");
  VTW_REQUIRE(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()) == shape, op, argument,
              text("shape ", list_text(shape)), shape_text(x));
}

// The gradient of a state, or of the divergence itself; returns whether it is the latter.
inline bool check_gradient(const Tensor& grad, std::vector<int64_t> state_shape, const Tensor& logits) {
  const bool of_divergence = grad.dim() + 1 == static_cast<int64_t>(state_shape.size());
  if (of_divergence) state_shape.pop_back();
  check_row_states("grad", grad, state_shape, logits);
  return of_divergence;
}

inline void check_scaled(const std::vector<Tensor>& tensors, const Tensor& factor) {
  const char* op = "scale_";
  VTW_REQUIRE(factor.dim() == 0, op, "factor", "a scalar", shape_text(factor));
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& x = tensors[i];
    const auto argument = [&] { return text("tensors[", i, "]"); };
    const auto dtype = x.scalar_type(), of_factor = factor.scalar_type();
    VTW_REQUIRE(is_floating(dtype), op, argument(), "a dtype of fp32, fp16, bf16 or fp64", dtype_name(dtype));
    VTW_REQUIRE(of_factor == real_type(dtype), op, "factor", text("dtype ", dtype_name(real_type(dtype))),
                dtype_name(of_factor));
    VTW_REQUIRE(x.device() == factor.device(), op, argument(), "the device of factor", "another one");
    VTW_REQUIRE(x.is_contiguous(), op, argument(), "contiguous memory", shape_text(x));
  }
}

// `call` with T as the type of the logits, half precision as each device has it.
#define VTW_DISPATCH_LOGITS(dtype, HALF, BFLOAT16, call) \
  switch (dtype) {                                       \
    case ScalarType::Float: {                            \
      using T = float;                                   \
      return call;                                       \
    }                                                    \
    case ScalarType::Half: {                             \
      using T = HALF;                                    \
      return call;                                       \
    }                                                    \
    case ScalarType::BFloat16: {                         \
      using T = BFLOAT16;                                \
      return call;                                       \
    }                                                    \
    default: {                                           \
      using T = double;                                  \
      return call;                                       \
    }                                                    \
  }

inline void check_state(const char* op, const std::string& argument, const Tensor& state) {
  const auto dtype = state.scalar_type();
  VTW_REQUIRE(dtype == ScalarType::Float || dtype == ScalarType::Double, op, argument, "dtype fp32 or fp64",
              dtype_name(dtype));
  VTW_REQUIRE(state.dim() >= 1 && state.size(state.dim() - 1) == 5, op, argument, "[..., 5]: (m_p, z_p, a, m_q, z_q)",
              shape_text(state));
}

inline void check_states(const std::vector<Tensor>& states) {
  const char* op = "merge_kl_states";
  VTW_REQUIRE(!states.empty(), op, "states", "at least one state", "0");
  for (size_t i = 0; i < states.size(); ++i) {
    const std::string argument = text("states[", i, "]");
    check_state(op, argument, states[i]);
    VTW_REQUIRE(states[i].scalar_type() == states[0].scalar_type(), op, argument,
                text("dtype ", dtype_name(states[0].scalar_type()), " of states[0]"),
                dtype_name(states[i].scalar_type()));
    VTW_REQUIRE(states[i].device() == states[0].device(), op, argument, "the device of states[0]", "another one");
    VTW_REQUIRE(list_text(states[i].sizes()) == list_text(states[0].sizes()), op, argument,
                text("shape ", list_text(states[0].sizes()), " of states[0]"), shape_text(states[i]));
  }
}

}  // namespace vtw
