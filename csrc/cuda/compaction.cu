// Compaction on the GPU, as torch calls it: check, allocate, describe, launch. The kernels are in compaction.cuh.
//
// Nothing is read back to the host, so the values of a plan or a block table are not checked; the kernels keep to the
// tensors whatever they are.

#include <climits>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/compaction.cuh"
#include "cuda/stream.h"
#include "allocate.h"
#include "lanes.h"
#include "overlap.h"

namespace vtw::cuda {
namespace {

Plan plan_of(const Tensor& source) {
  return {static_cast<const int32_t*>(source.const_data_ptr()), source.size(0), source.size(1), source.stride(0),
          source.stride(1)};
}

// The widest vector, up to 16 bytes, in whose multiples everything is.
int8_t log_vector(const vtw::Lanes& view) {
  uint64_t bits = reinterpret_cast<uintptr_t>(view.from) | reinterpret_cast<uintptr_t>(view.to) | view.block |
                  view.from_batch | view.to_batch | view.from_row | view.to_row | 16;
  for (const auto& dim : view.dims) bits |= dim.from_stride | dim.to_stride;
  return static_cast<int8_t>(__builtin_ctzll(bits));
}

// Appends the descriptor of one tensor; more than one if it has more dimensions than a descriptor.
void describe(const vtw::Lanes& view, int64_t limit, std::vector<Lanes>& list) {
  Lanes lanes{view.from, view.to, view.from_batch, view.to_batch, view.from_row, view.to_row, limit};
  lanes.log_vector = log_vector(view);
  lanes.vectors = view.block >> lanes.log_vector;
  lanes.count = 1;
  int64_t copies = 1;
  for (size_t d = 0; d < std::max<size_t>(view.dims.size(), Lanes::kDims); ++d) {
    if (d >= Lanes::kDims) {
      copies *= view.dims[d].size;
    } else if (d < view.dims.size()) {
      lanes.dims[d] = {view.dims[d].size, view.dims[d].from_stride, view.dims[d].to_stride};
      lanes.count *= view.dims[d].size;
    } else {
      lanes.dims[d] = {1, 0, 0};
    }
  }
  for (int64_t copy = 0; copy < copies; ++copy) {
    lanes.from = view.from;
    lanes.to = view.to;
    view.locate(copy * lanes.count, lanes.from, lanes.to);
    list.push_back(lanes);
  }
}

// Gives zeros that live as long as it does.
class Zeros {
 public:
  Zeros(const Tensor& like, cudaStream_t stream) : like_(like), stream_(stream) {}
  unsigned* operator()(int64_t count) {
    tensors_.push_back(allocate(like_, {count}, ScalarType::Int));
    void* const memory = tensors_.back().mutable_data_ptr();
    check(cudaMemsetAsync(memory, 0, count * sizeof(unsigned), stream_), "cudaMemsetAsync");
    return static_cast<unsigned*>(memory);
  }

 private:
  const Tensor& like_;
  cudaStream_t stream_;
  std::vector<Tensor> tensors_;
};

std::tuple<Tensor, Tensor> plan_compaction(const Tensor& keep, int64_t length, bool pad_left) {
  check_keep(keep, length);
  const int64_t batch = keep.size(0), tokens = keep.size(1);
  VTW_REQUIRE(tokens <= INT_MAX, "plan_compaction", "keep", "at most 2^31 - 1 tokens", text(tokens));
  const int64_t rows = length < 0 ? tokens : length;
  const OnDeviceOf on(keep);
  Tensor source = allocate(keep, {batch, rows}, ScalarType::Int);
  Tensor lengths = allocate(keep, {batch}, ScalarType::Int);
  plan(static_cast<const uint8_t*>(keep.const_data_ptr()), keep.stride(0), keep.stride(1), nullptr, 0, batch, tokens,
       rows, pad_left, static_cast<int32_t*>(source.mutable_data_ptr()),
       static_cast<int32_t*>(lengths.mutable_data_ptr()), on.stream);
  return {source, lengths};
}

// New tensors whose rows are those that `rows` names; compact and expand differ in nothing else.
std::vector<Tensor> gather_rows(const std::vector<Tensor>& tensors, const std::vector<TokenDims>& dims,
                                const Plan& rows, cudaStream_t stream) {
  std::vector<Tensor> results;
  std::vector<Lanes> list;
  results.reserve(tensors.size());
  list.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    std::vector<int64_t> shape(tensors[i].sizes().begin(), tensors[i].sizes().end());
    shape[dims[i].token] = rows.rows;
    shape[dims[i].batch] = rows.batch;
    results.push_back(allocate(tensors[i], shape));
    if (results[i].numel() == 0) continue;
    describe(vtw::Lanes(tensors[i], results[i], dims[i]), tensors[i].size(dims[i].token), list);
  }
  gather(std::move(list), rows, stream);
  return results;
}

std::vector<Tensor> compact(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
                            const std::vector<int64_t>& batch_dims, const Tensor& source) {
  const auto dims = check_tensors(Op::kCompact, tensors, token_dims, batch_dims, source);
  const OnDeviceOf on(source);
  return gather_rows(tensors, dims, plan_of(source), on.stream);
}

std::vector<Tensor> expand(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
                           const std::vector<int64_t>& batch_dims, const Tensor& source, int64_t length) {
  const auto dims = check_tensors(Op::kExpand, tensors, token_dims, batch_dims, source);
  VTW_REQUIRE(length >= 0, "expand", "length", "a number of rows", text(length));
  const OnDeviceOf on(source);
  Tensor inverse = allocate(source, {source.size(0), length});
  invert(plan_of(source), length, static_cast<int32_t*>(inverse.mutable_data_ptr()), on.stream);
  return gather_rows(tensors, dims, plan_of(inverse), on.stream);
}

void compact_(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
              const std::vector<int64_t>& batch_dims, const Tensor& source) {
  const auto dims = check_tensors(Op::kCompactInPlace, tensors, token_dims, batch_dims, source);
  check_disjoint("compact_", "tensors", tensors, {{"source", source}});
  const OnDeviceOf on(source);
  std::vector<Lanes> list;
  list.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    describe(vtw::Lanes(tensors[i], tensors[i], dims[i]), tensors[i].size(dims[i].token), list);
  }
  Zeros zeros(source, on.stream);
  move(std::move(list), plan_of(source), DenseRows(), zeros, on.stream);
}

Tensor compact_paged_(const std::vector<Tensor>& caches, const Tensor& block_table, const Tensor& seq_lens,
                      const Tensor& keep, const std::string& layout) {
  check_paged(caches, block_table, seq_lens, keep, layout);
  check_disjoint("compact_paged_", "caches", caches,
                 {{"block_table", block_table}, {"seq_lens", seq_lens}, {"keep", keep}});
  const int64_t batch = keep.size(0), tokens = keep.size(1);
  const int64_t slots = layout == "NHD" ? 1 : 2;
  const OnDeviceOf on(keep);
  Tensor source = allocate(seq_lens, {batch, tokens});
  Tensor lengths = allocate(seq_lens, {batch});
  plan(static_cast<const uint8_t*>(keep.const_data_ptr()), keep.stride(0), keep.stride(1),
       static_cast<const int32_t*>(seq_lens.const_data_ptr()), seq_lens.stride(0), batch, tokens, tokens, false,
       static_cast<int32_t*>(source.mutable_data_ptr()), static_cast<int32_t*>(lengths.mutable_data_ptr()), on.stream);
  std::vector<Lanes> list;
  list.reserve(caches.size());
  for (const Tensor& cache : caches) {
    if (cache.numel() == 0) continue;
    describe(vtw::Lanes(cache, cache, {slots, 0}), cache.size(0), list);
  }
  if (list.empty() || source.numel() == 0) return lengths;
  const PagedRows rows{static_cast<const int32_t*>(block_table.const_data_ptr()), block_table.size(1),
                       block_table.stride(0), block_table.stride(1), Divisor(caches[0].size(slots))};
  Zeros zeros(source, on.stream);
  move(std::move(list), plan_of(source), rows, zeros, on.stream);
  return lengths;
}

void plan_packed_(const std::vector<Tensor>& plan, const Tensor& query_start, const Tensor& seq_lens,
                  const Tensor& visual, const Tensor& visual_start, const Tensor& block_table, int64_t block_size) {
  check_packed(plan, query_start, seq_lens, visual, visual_start, block_table, block_size);
  check_disjoint("plan_packed_", "plan", plan,
                 {{"query_start", query_start},
                  {"seq_lens", seq_lens},
                  {"visual", visual},
                  {"visual_start", visual_start},
                  {"block_table", block_table}});
  const OnDeviceOf on(query_start);
  const auto read = [](const Tensor& x) { return static_cast<const int32_t*>(x.const_data_ptr()); };
  const auto written = [](const Tensor& x) { return static_cast<int32_t*>(x.mutable_data_ptr()); };
  pack({read(query_start), read(seq_lens), read(visual), read(visual_start), read(block_table), seq_lens.size(0),
        visual.size(0), block_table.size(1), block_table.stride(0), block_table.stride(1), block_size, plan[0].size(0),
        written(plan[0]), written(plan[1]), written(plan[2]), static_cast<int64_t*>(plan[3].mutable_data_ptr())},
       on.stream);
}

}  // namespace
}  // namespace vtw::cuda

#ifdef __CUDACC__
STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CUDA, m) {
  if (!vtw::backend_enabled("cuda")) return;
  m.impl("plan_compaction", TORCH_BOX(&vtw::cuda::plan_compaction));
  m.impl("compact", TORCH_BOX(&vtw::cuda::compact));
  m.impl("compact_", TORCH_BOX(&vtw::cuda::compact_));
  m.impl("expand", TORCH_BOX(&vtw::cuda::expand));
  m.impl("compact_paged_", TORCH_BOX(&vtw::cuda::compact_paged_));
  m.impl("plan_packed_", TORCH_BOX(&vtw::cuda::plan_packed_));
}
#endif
