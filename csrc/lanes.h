// A tensor as compaction sees it, on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"

namespace vtw {

// A tensor, and where it goes, seen as *lanes*: for each sequence and each index of the other dimensions, a column of
// rows. A row of a lane is `block` contiguous bytes in both; dimensions that are not contiguous with it become lanes.
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
    // A dimension of size 1 takes no step, whatever its stride says; a source of batch size 1 serves every sequence.
    const auto stride = [&](const Tensor& x, int64_t dim) { return x.size(dim) == 1 ? 0 : x.stride(dim) * item; };
    from_batch = stride(source, at.batch);
    to_batch = stride(target, at.batch);
    from_row = stride(source, at.token);
    to_row = stride(target, at.token);
    std::vector<Dim> others;
    for (int64_t d = 0; d < source.dim(); ++d) {
      if (d == at.token || d == at.batch || source.size(d) == 1) continue;
      others.push_back({source.size(d), source.stride(d) * item, target.stride(d) * item});
    }
    std::stable_sort(others.begin(), others.end(),
                     [](const Dim& a, const Dim& b) { return a.to_stride < b.to_stride; });
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
