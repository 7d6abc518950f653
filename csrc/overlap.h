// Whether tensors that are written in place share memory, with one another or with a tensor that is only read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <utility>
#include <vector>

#include "checks.h"

namespace vtw {

// The bytes of one tensor. Strides *nest* when each is at least as long as all that lies inside it. Every view of a
// cache nests, and for nested strides overlap can be decided exactly. Any other strides are refused.
struct Extent {
  size_t index;
  int64_t begin, end, item;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride in bytes, size), outermost first

  Extent(size_t index, const Tensor& x)
      : index(index),
        begin(reinterpret_cast<int64_t>(x.const_data_ptr())),
        item(static_cast<int64_t>(x.element_size())) {
    end = begin + item;
    const auto sizes = x.sizes(), strides = x.strides();
    dims.reserve(sizes.size());
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] == 1) continue;
      dims.emplace_back(strides[d] * item, sizes[d]);
      end += dims.back().first * (sizes[d] - 1);
    }
    std::sort(dims.rbegin(), dims.rend());
  }

  bool nests() const {
    int64_t inside = item;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      if (dim->first < inside) return false;
      inside += dim->first * (dim->second - 1);
    }
    return true;
  }

  bool same_strides(const Extent& other) const {
    return item == other.item && dims.size() == other.dims.size() &&
           std::equal(dims.begin(), dims.end(), other.dims.begin(),
                      [](const auto& a, const auto& b) { return a.first == b.first; });
  }

  // Is an element of `other` within an element's size of one of ours? `apart` is the distance that the dimensions from
  // `d` on must make up. What lies inside a stride is shorter than it, so only the two nearest multiples can do.
  bool meets(const Extent& other, int64_t apart, size_t d = 0) const {
    if (d == dims.size()) return std::abs(apart) < item;
    const auto [stride, size] = dims[d];
    const int64_t below = apart / stride - (apart % stride < 0);
    for (int64_t steps : {below, below + 1}) {
      if (-other.dims[d].second < steps && steps < size && meets(other, apart - steps * stride, d + 1)) return true;
    }
    return false;
  }
};

// Raises if tensors that are written in place overlap themselves, one another, or a tensor that is only `read`, such as
// the plan, which must not change while rows move. The latter is refused even where its bytes lie in a gap of a tensor.
inline void check_disjoint(const char* op, const char* argument, const std::vector<Tensor>& tensors,
                           std::initializer_list<std::pair<const char*, const Tensor&>> read) {
  std::vector<Extent> extents;
  extents.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() == 0) continue;
    extents.emplace_back(i, tensors[i]);
    VTW_REQUIRE(extents.back().nests(), op, text(argument, "[", i, "]"), "memory of its own for every element",
                text("strides ", list_text(tensors[i].strides())));
  }
  for (const auto& [name, x] : read) {
    if (x.numel() == 0) continue;
    const Extent other(0, x);
    for (const Extent& extent : extents) {
      VTW_REQUIRE(other.end <= extent.begin || extent.end <= other.begin, op, text(argument, "[", extent.index, "]"),
                  text("memory apart from ", name), "an overlap");
    }
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (size_t i = 0; i < extents.size(); ++i) {
    for (size_t j = i + 1; j < extents.size() && extents[j].begin < extents[i].end; ++j) {
      const Extent &a = extents[i], &b = extents[j];
      VTW_REQUIRE(a.same_strides(b) && !a.meets(b, b.begin - a.begin), op,
                  text(argument, "[", std::max(a.index, b.index), "]"),
                  text("memory apart from ", argument, "[", std::min(a.index, b.index), "]"), "an overlap");
    }
  }
}

}  // namespace vtw
