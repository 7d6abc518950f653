// The host twins of the package's kernels, and of the one that broken.cu launches.

#include "cuda/compaction.cuh"
#include "cuda/kl_divergence.cuh"

#include "broken.cu"
#include "twin.h"

namespace vtw::cuda {

template <int... capacities>
struct WithTables : Twins<gather_kernel<capacities>..., move_kernel<capacities, DenseRows>...,
                          move_kernel<capacities, PagedRows>...> {};
WithTables<kSmallTable, kMediumTable, kLargeTable> with_tables;
Twins<plan_kernel, invert_kernel> plans;

template <typename... T>
struct OfLogits : Twins<kl::forward_kernel<T>..., kl::backward_kernel<T>..., kl::forward_backward_kernel<T>...,
                        kl::scale_kernel<T>...> {};
OfLogits<float, double, __half, __nv_bfloat16> of_logits;
Twins<kl::merge_kernel<float>, kl::merge_kernel<double>, kl::from_state_kernel<float>, kl::from_state_kernel<double>>
    of_states;

}  // namespace vtw::cuda

Twins<broken::add_one> of_broken;
