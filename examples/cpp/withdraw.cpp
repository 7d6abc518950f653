// The ops from C++, without Python: withdraws the visual tokens of a prompt from its hidden states and its KV cache,
// and says how much a prediction has changed. See examples/README.md for how to build and run it.

#include <dlfcn.h>

#include <cstdio>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

// An op by its name; the schemas are in csrc/ops.cpp.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

int main(int argc, char** arguments) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s PATH_OF_vtw_kernels/_C*.so\n", arguments[0]), 2;
  if (!dlopen(arguments[1], RTLD_NOW)) return std::fprintf(stderr, "%s\n", dlerror()), 1;  // registers the ops

  const int64_t batch = 1, tokens = 12, heads = 2, dim = 4, vocabulary = 100;
  at::Tensor keep = at::ones({batch, tokens}, at::kBool);
  keep.slice(1, 2, 10).fill_(false);  // the image stands between the second and the tenth token
  const auto plan =
      op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, c10::SymInt, bool)>("vtw_kernels::plan_compaction");
  const auto [source, lengths] = plan.call(keep, /*length=*/4, /*pad_left=*/false);

  const std::vector<at::Tensor> hidden{at::arange(tokens, at::kFloat).view({batch, tokens, 1})};
  const auto compact = op<std::vector<at::Tensor>(at::TensorList, at::IntArrayRef, at::IntArrayRef, const at::Tensor&)>(
      "vtw_kernels::compact");
  const at::Tensor kept = compact.call(hidden, {1}, {0}, source)[0];

  const std::vector<at::Tensor> cache{
      at::arange(tokens, at::kFloat).view({1, 1, tokens, 1}).repeat({batch, heads, 1, dim})};
  const auto compact_ =
      op<void(at::TensorList, at::IntArrayRef, at::IntArrayRef, const at::Tensor&)>("vtw_kernels::compact_");
  compact_.call(cache, {2}, {0}, source);  // in place

  const at::Tensor logits = at::linspace(-1, 1, vocabulary).view({batch, vocabulary});
  const auto divergence = op<at::Tensor(const at::Tensor&, const at::Tensor&, double)>("vtw_kernels::kl_divergence");
  const at::Tensor same = divergence.call(logits, logits, 1.0), other = divergence.call(logits, -logits, 1.0);

  std::printf("kept %d of %d:", lengths.item<int>(), static_cast<int>(tokens));
  for (int64_t i = 0; i < kept.size(1); ++i) std::printf(" %g", kept[0][i][0].item<float>());
  std::printf("\nfirst rows of the cache:");
  for (int64_t i = 0; i < 4; ++i) std::printf(" %g", cache[0][0][1][i][3].item<float>());
  std::printf("\nKL %.4f and %.4f\n", same.item<float>(), other.item<float>());
}
