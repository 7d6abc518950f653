// A tensor as compaction sees it, on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace vtw {

// A tensor and its target, seen as *lanes*. A row along the token dimension is cut into pieces that are contiguous in
// both tensors, of `block` bytes each; the pieces at one place of all rows of a sequence are a lane. So a lane is a
// column of `block` bytes per row, and dimensions that are not contiguous with `block` are counted by lanes.
struct Lanes {
  struct Dim {
    int64_t size, from_stride, to_stride;  // strides in bytes, here and below
  };

  const char* from;
  char* to;
  int64_t block;
  int64_t from_batch, to_batch, from_row, to_row;
  int64_t count = 1;      // lanes per sequence
  std::vector<Dim> dims;  // innermost first, in the order in which `to` lies in memory

  Lanes(const Tensor& source, const Tensor& target, TokenDims at)
      : from(static_cast<const char*>(source.const_data_ptr())),
        to(static_cast<char*>(target.mutable_data_ptr())),
        block(static_cast<int64_t>(source.element_size())) {
    const int64_t item = block;
    const auto sizes = source.sizes(), from_strides = source.strides();
    const auto to_sizes = target.sizes(), to_strides = target.strides();
    // A dimension of size 1 takes no step, whatever its stride says; a source of batch size 1 serves every sequence.
    from_batch = sizes[at.batch] == 1 ? 0 : from_strides[at.batch] * item;
    to_batch = to_sizes[at.batch] == 1 ? 0 : to_strides[at.batch] * item;
    from_row = sizes[at.token] == 1 ? 0 : from_strides[at.token] * item;
    to_row = to_sizes[at.token] == 1 ? 0 : to_strides[at.token] * item;
    std::vector<Dim> others;
    others.reserve(sizes.size());
    for (int64_t d = 0; d < static_cast<int64_t>(sizes.size()); ++d) {
      if (d == at.token || d == at.batch || sizes[d] == 1) continue;
      const Dim dim{sizes[d], from_strides[d] * item, to_strides[d] * item};
      const auto lies_before = [](const Dim& a, const Dim& b) { return a.to_stride < b.to_stride; };
      others.insert(std::upper_bound(others.begin(), others.end(), dim, lies_before), dim);
    }
    for (const Dim& dim : others) {
      if (dims.empty() && dim.from_stride == block && dim.to_stride == block) {
        block *= dim.size;
        continue;
      }
      count *= dim.size;
      // One dimension instead of two, where the outer one goes on where the inner one ends.
      const bool continues = !dims.empty() && dim.from_stride == dims.back().size * dims.back().from_stride &&
                             dim.to_stride == dims.back().size * dims.back().to_stride;
      if (continues) {
        dims.back().size *= dim.size;
      } else {
        dims.push_back(dim);
      }
    }
  }

  void locate(int64_t lane, const char*& source, char*& target) const {
    for (const Dim& dim : dims) {
      source += lane % dim.size * dim.from_stride;
      target += lane % dim.size * dim.to_stride;
      lane /= dim.size;
    }
  }
};

}  // namespace vtw
