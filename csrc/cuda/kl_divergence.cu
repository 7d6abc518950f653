// KL divergence on the GPU, as torch calls it: check, allocate, describe, launch. The kernels are in kl_divergence.cuh.

#include <climits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "checks.h"
#include "cuda/kl_divergence.cuh"
#include "cuda/stream.h"

namespace vtw::cuda {
namespace {

// The two tensors as pairs of rows. Neighbouring dimensions that both walk through in one stride become one.
template <typename T>
kl::Pairs<T> pairs_of(const char* op, const Tensor& p, const Tensor& q, std::vector<int64_t>& shape) {
  kl::Pairs<T> pairs{static_cast<const T*>(p.const_data_ptr()), static_cast<const T*>(q.const_data_ptr()),
                     p.size(p.dim() - 1), p.stride(p.dim() - 1), q.stride(q.dim() - 1)};
  if (pairs.vocabulary <= 1) pairs.p_step = pairs.q_step = 1;
  const int64_t rank = std::max(p.dim(), q.dim()) - 1;
  shape.assign(rank, 1);
  int64_t rows = 1;
  for (int64_t d = 1; d <= rank; ++d) {  // from the last of the leading dimensions
    const auto size_in = [&](const Tensor& x) { return d < x.dim() ? x.size(x.dim() - 1 - d) : 1; };
    const auto stride_in = [&](const Tensor& x) { return size_in(x) == 1 ? 0 : x.stride(x.dim() - 1 - d); };
    const int64_t size = size_in(p) == 1 ? size_in(q) : size_in(p);
    shape[rank - d] = size;
    rows *= size;
    VTW_REQUIRE(rows <= INT_MAX, op, "p_logits", "at most 2^31 - 1 rows", text(rows));
    if (size == 1) continue;
    const int64_t p_stride = stride_in(p), q_stride = stride_in(q);
    auto* inner = pairs.dims > 0 ? &pairs.dim[pairs.dims - 1] : nullptr;
    if (inner && p_stride == inner->p_stride * inner->size && q_stride == inner->q_stride * inner->size) {
      inner->size *= static_cast<uint32_t>(size);
      continue;
    }
    VTW_REQUIRE(pairs.dims < kl::Pairs<T>::kDims, op, "p_logits",
                text("at most ", kl::Pairs<T>::kDims, " leading dimensions of unlike strides"), shape_text(p));
    pairs.dim[pairs.dims++] = {static_cast<uint32_t>(size), p_stride, q_stride};
  }
  pairs.rows = static_cast<uint32_t>(rows);
  return pairs;
}

// VTW_KERNELS_CLUSTERS=0 does without thread-block clusters, as a device does that has none. Read once.
bool clusters_wanted() {
  static const bool wanted = [] {
    const char* const value = std::getenv("VTW_KERNELS_CLUSTERS");
    const std::string given = value && *value ? value : "1";
    if (given != "0" && given != "1") {
      throw std::runtime_error("VTW_KERNELS_CLUSTERS: expected 0 or 1, got '" + given + "'");
    }
    return given == "1";
  }();
  return wanted;
}

// The current device. Asked once for each that a thread works on, for asking takes longer than a launch.
const kl::Device& current_device() {
#ifdef __CUDACC__
  thread_local int known = -1;
  thread_local kl::Device device;
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == known) return device;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, current), "cudaDeviceGetAttribute");
    return value;
  };
  // Code that was compiled for an older architecture runs on a newer one, but without its clusters.
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kl::forward_kernel<float>), "cudaFuncGetAttributes");
  const bool clusters = ask(cudaDevAttrClusterLaunch) != 0 && code.ptxVersion >= 90 && clusters_wanted();
  device = {ask(cudaDevAttrMultiProcessorCount), clusters,
            static_cast<size_t>(ask(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
  known = current;
  return device;
#else
  // Few multiprocessors, so that the tests split rows in more than one way.
  static const kl::Device device{4, clusters_wanted(), 227 * 1024};
  return device;
#endif
}

template <typename R>
kl::State<R>* states_of(const Tensor& x) {
  return static_cast<kl::State<R>*>(x.mutable_data_ptr());
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Tensor& p_logits, const Tensor& q_logits, double temperature) {
  using R = kl::Real<T>;
  const OnDeviceOf on(p_logits);
  std::vector<int64_t> shape;
  const auto pairs = pairs_of<T>("kl_divergence", p_logits, q_logits, shape);
  kl::Forward<T> f{pairs, kl::choose_grid<T>(pairs.rows, pairs.vocabulary, current_device(), true), temperature};
  const auto dtype = real_type(p_logits.scalar_type());
  Tensor result = allocate(p_logits, shape, dtype);
  shape.push_back(5);
  Tensor state = allocate(p_logits, shape, dtype);
  f.kl = static_cast<R*>(result.mutable_data_ptr());
  f.state = states_of<R>(state);
  std::vector<Tensor> workspace;
  if (f.grid.chunks > 1 && !f.grid.cluster) {
    // Allocated for each call: two streams, or two replays of a graph, never share it.
    workspace = {allocate(p_logits, {pairs.rows, f.grid.chunks, 5}, dtype),
                 allocate(p_logits, {pairs.rows}, ScalarType::Int)};
    f.partial = states_of<R>(workspace[0]);
    f.arrived = static_cast<unsigned*>(workspace[1].mutable_data_ptr());
  }
  kl::forward(f, on.stream);
  return {result, state};
}

template <typename T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& p_logits, const Tensor& q_logits,
                                    const Tensor& state, double temperature, bool need_p, bool need_q) {
  using R = kl::Real<T>;
  const OnDeviceOf on(p_logits);
  std::vector<int64_t> shape;
  const auto pairs = pairs_of<T>("kl_divergence_backward", p_logits, q_logits, shape);
  shape.push_back(5);
  check_row_states("state", state, shape, p_logits);
  const bool of_divergence = check_gradient(grad, shape, p_logits);
  kl::Backward<T> b{pairs, kl::choose_grid<T>(pairs.rows, pairs.vocabulary, current_device(), false), temperature};
  const Tensor states = torch::stable::contiguous(state), grads = torch::stable::contiguous(grad);
  b.state = states_of<R>(states);
  if (of_divergence) {
    b.weights.each = static_cast<const R*>(grads.const_data_ptr());
  } else {
    b.gradient = states_of<R>(grads);
  }
  shape.back() = pairs.vocabulary;
  const std::vector<int64_t> nothing{0};
  Tensor grad_p = allocate(p_logits, need_p ? shape : nothing);
  Tensor grad_q = allocate(q_logits, need_q ? shape : nothing);
  b.grad_p = need_p ? static_cast<T*>(grad_p.mutable_data_ptr()) : nullptr;
  b.grad_q = need_q ? static_cast<T*>(grad_q.mutable_data_ptr()) : nullptr;
  if (need_p || need_q) kl::backward(b, on.stream);
  return {grad_p, grad_q};
}

// The divergence and the gradients of Σ weight·KL (without weights, of the mean), in one read of the logits where a
// cluster has room for a pair of rows, and otherwise in two.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> with_gradients(const Tensor& p_logits, const Tensor& q_logits,
                                                  const std::optional<Tensor>& weight, double temperature, bool need_p,
                                                  bool need_q) {
  using R = kl::Real<T>;
  const char* op = "kl_divergence_with_gradients";
  const OnDeviceOf on(p_logits);
  std::vector<int64_t> shape;
  const auto pairs = pairs_of<T>(op, p_logits, q_logits, shape);
  if (weight) check_row_states("weight", *weight, shape, p_logits, op);
  const auto type = real_type(p_logits.scalar_type());
  const Tensor weights = weight ? torch::stable::contiguous(*weight) : allocate(p_logits, {0}, type);
  const kl::Weights<R> of_rows{weight ? static_cast<const R*>(weights.const_data_ptr()) : nullptr,
                               static_cast<R>(1.0 / pairs.rows)};
  std::vector<int64_t> full = shape;
  full.push_back(pairs.vocabulary);
  const std::vector<int64_t> nothing{0};
  Tensor grad_p = allocate(p_logits, need_p ? full : nothing);
  Tensor grad_q = allocate(q_logits, need_q ? full : nothing);
  T* const to_p = need_p ? static_cast<T*>(grad_p.mutable_data_ptr()) : nullptr;
  T* const to_q = need_q ? static_cast<T*>(grad_q.mutable_data_ptr()) : nullptr;

  const uint32_t blocks = need_p || need_q ? kl::choose_cluster(pairs, current_device()) : 0;
  if (blocks > 0) {
    Tensor result = allocate(p_logits, shape, type);
    kl::ForwardBackward<T> f{pairs, temperature};
    f.blocks = blocks;
    f.kl = static_cast<R*>(result.mutable_data_ptr());
    f.weights = of_rows;
    f.grad_p = to_p;
    f.grad_q = to_q;
    kl::forward_backward(f, on.stream);
    return {result, grad_p, grad_q};
  }
  const auto [result, state] = forward<T>(p_logits, q_logits, temperature);
  kl::Backward<T> b{pairs, kl::choose_grid<T>(pairs.rows, pairs.vocabulary, current_device(), false), temperature};
  b.state = states_of<R>(state);
  b.weights = of_rows;
  b.grad_p = to_p;
  b.grad_q = to_q;
  if (need_p || need_q) kl::backward(b, on.stream);
  return {result, grad_p, grad_q};
}

std::tuple<Tensor, Tensor> kl_divergence_with_state(const Tensor& p_logits, const Tensor& q_logits,
                                                    double temperature) {
  check_logits("kl_divergence", p_logits, q_logits, temperature);
  VTW_DISPATCH_LOGITS(p_logits.scalar_type(), __half, __nv_bfloat16, forward<T>(p_logits, q_logits, temperature));
}

std::tuple<Tensor, Tensor> kl_divergence_backward(const Tensor& grad, const Tensor& p_logits, const Tensor& q_logits,
                                                  const Tensor& state, double temperature, bool need_p, bool need_q) {
  check_logits("kl_divergence_backward", p_logits, q_logits, temperature);
  VTW_DISPATCH_LOGITS(p_logits.scalar_type(), __half, __nv_bfloat16,
                      backward<T>(grad, p_logits, q_logits, state, temperature, need_p, need_q));
}

std::tuple<Tensor, Tensor, Tensor> kl_divergence_with_gradients(const Tensor& p_logits, const Tensor& q_logits,
                                                                const std::optional<Tensor>& weight, double temperature,
                                                                bool need_p, bool need_q) {
  check_logits("kl_divergence_with_gradients", p_logits, q_logits, temperature);
  VTW_DISPATCH_LOGITS(p_logits.scalar_type(), __half, __nv_bfloat16,
                      with_gradients<T>(p_logits, q_logits, weight, temperature, need_p, need_q));
}

template <typename T>
void scale(const Tensor& x, const Tensor& factor, cudaStream_t stream) {
  kl::scale(static_cast<T*>(x.mutable_data_ptr()), x.numel(), static_cast<const kl::Real<T>*>(factor.const_data_ptr()),
            current_device(), stream);
}

void scale_(const std::vector<Tensor>& tensors, const Tensor& factor) {
  check_scaled(tensors, factor);
  const OnDeviceOf on(factor);
  for (const Tensor& x : tensors) {
    [&] { VTW_DISPATCH_LOGITS(x.scalar_type(), __half, __nv_bfloat16, scale<T>(x, factor, on.stream)); }();
  }
}

template <typename R>
Tensor merge(const std::vector<Tensor>& states) {
  const OnDeviceOf on(states[0]);
  const std::vector<int64_t> shape(states[0].sizes().begin(), states[0].sizes().end());
  Tensor result = allocate(states[0], shape);
  const int64_t rows = result.numel() / 5;
  std::vector<Tensor> parts;  // alive until their last launch
  for (const Tensor& state : states) parts.push_back(torch::stable::contiguous(state));
  kl::StateList<R> list{};
  for (const Tensor& part : parts) {
    list.states[list.count++] = states_of<R>(part);
    if (list.count < list.kCapacity && &part != &parts.back()) continue;
    kl::merge_states(list, rows, states_of<R>(result), on.stream);
    list.states[0] = states_of<R>(result);  // a longer list goes on from here
    list.count = 1;
  }
  return result;
}

Tensor merge_kl_states(const std::vector<Tensor>& states) {
  check_states(states);
  return states[0].scalar_type() == ScalarType::Double ? merge<double>(states) : merge<float>(states);
}

template <typename R>
Tensor from_state(const Tensor& state) {
  const OnDeviceOf on(state);
  const Tensor states = torch::stable::contiguous(state);
  std::vector<int64_t> shape(state.sizes().begin(), state.sizes().end());
  shape.pop_back();
  Tensor result = allocate(state, shape);
  kl::from_state(states_of<R>(states), result.numel(), static_cast<R*>(result.mutable_data_ptr()), on.stream);
  return result;
}

Tensor kl_from_state(const Tensor& state) {
  check_state("kl_from_state", "state", state);
  return state.scalar_type() == ScalarType::Double ? from_state<double>(state) : from_state<float>(state);
}

}  // namespace
}  // namespace vtw::cuda

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CUDA, m) {
  if (!vtw::backend_enabled("cuda")) return;
  m.impl("kl_divergence_with_state", TORCH_BOX(&vtw::cuda::kl_divergence_with_state));
  m.impl("kl_divergence_backward", TORCH_BOX(&vtw::cuda::kl_divergence_backward));
  m.impl("kl_divergence_with_gradients", TORCH_BOX(&vtw::cuda::kl_divergence_with_gradients));
  m.impl("scale_", TORCH_BOX(&vtw::cuda::scale_));
  m.impl("merge_kl_states", TORCH_BOX(&vtw::cuda::merge_kl_states));
  m.impl("kl_from_state", TORCH_BOX(&vtw::cuda::kl_from_state));
}
#endif
