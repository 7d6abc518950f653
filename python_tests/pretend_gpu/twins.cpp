// The host twins of the package's kernels, and of the one that broken.cu launches.

#include "cuda/compaction.cuh"
#include "cuda/kl_divergence.cuh"

#include "broken.cu"
#include "twin.h"

namespace vtw::cuda {

template <int... capacities>
struct WithTables : Twins<move_kernel<capacities, GatheredRows, false>..., move_kernel<capacities, DenseRows, false>...,
                          move_kernel<capacities, DenseRows, true>..., move_kernel<capacities, PagedRows, false>...,
                          move_kernel<capacities, PagedRows, true>...> {};
WithTables<kSmallTable, kMediumTable, kLargeTable> with_tables;
Twins<plan_kernel, pack_kernel, invert_kernel> plans;

template <typename... T>
struct OfLogits : Twins<kl::forward_kernel<T>..., kl::scale_kernel<T>...> {};
template <bool of_p, bool of_q, typename... T>
struct OfGradients : Twins<kl::backward_kernel<T, of_p, of_q>..., kl::forward_backward_kernel<T, of_p, of_q>...> {};
OfLogits<float, double, __half, __nv_bfloat16> of_logits;
OfGradients<true, false, float, double, __half, __nv_bfloat16> of_p;
OfGradients<false, true, float, double, __half, __nv_bfloat16> of_q;
OfGradients<true, true, float, double, __half, __nv_bfloat16> of_both;
Twins<kl::merge_kernel<float>, kl::merge_kernel<double>, kl::from_state_kernel<float>, kl::from_state_kernel<double>>
    of_states;

}  // namespace vtw::cuda

Twins<broken::add_one> of_broken;
