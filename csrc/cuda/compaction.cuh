// Compaction on the GPU: plan, gather (compact, expand) and move (compact_, compact_paged_).
//
// A tensor is seen as *lanes*: one for each index of all dimensions but the batch, the token and those whose elements
// are contiguous; a row of a lane is a *block* of contiguous bytes, moved as vectors of at most 16. All tensors of a
// list go in one launch: their descriptors travel as an argument of the kernel, so nothing is copied to the device
// first and a CUDA graph captures them. Offsets are 64-bit, and any value of a plan or a block table keeps to the
// tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.cuh"

namespace vtw::cuda {

constexpr int kLogThreads = 8, kThreads = 1 << kLogThreads;
constexpr int kPlanThreads = 512, kPlanItems = 8;

// --- descriptors -----------------------------------------------------------------------------------------------------

// One tensor of a list; in place, `from` and `to` are the same. Strides are in bytes.
struct Lanes {
  static constexpr int kDims = 3;  // more than any layout of a decoder has; the binding unrolls the rest
  struct Dim {
    int64_t size, from_stride, to_stride;
  };

  const char* from;
  char* to;
  int64_t from_batch, to_batch, from_row, to_row;  // paged: a batch is a page
  int64_t limit;                                   // rows that `from` has; paged: pages
  int64_t count;                                   // lanes per sequence
  Dim dims[kDims];                                 // of which they are made, innermost first; unused: size 1
  int64_t vectors;                                 // in the block of a row
  int64_t first_block;                             // of the grid's blocks, the first that works on this tensor
  int8_t log_vector;                               // bytes of a vector
  int8_t log_columns, log_rows, log_lanes;         // how a block's threads are laid out: vectors × rows × lanes

  __device__ void locate(int64_t lane, int64_t& from_offset, int64_t& to_offset) const {
    from_offset = to_offset = 0;
    for (int d = 0; d < kDims; ++d) {
      const int64_t index = lane % dims[d].size;
      from_offset += index * dims[d].from_stride;
      to_offset += index * dims[d].to_stride;
      lane /= dims[d].size;
    }
  }
};

// A kernel's arguments may take 4 KB, and 32 KB from CUDA 12.1 on; a launch takes the smallest table that fits.
constexpr int kSmallTable = 24, kMediumTable = 80, kLargeTable = 200;

template <int Capacity>
struct Table {
  int64_t count;
  Lanes lanes[Capacity];

  // The tensor that a block works on.
  __device__ const Lanes& of_block(int64_t block) const {
    int first = 0;
    for (int last = static_cast<int>(count) - 1; first < last;) {
      const int middle = (first + last + 1) / 2;
      if (lanes[middle].first_block <= block) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return lanes[first];
  }
};
static_assert(sizeof(Table<kSmallTable>) <= 4096 - 128 && sizeof(Table<kLargeTable>) <= 32764 - 128);

// Rows of each sequence, as plan_compaction gives them.
struct Plan {
  const int32_t* data;
  int64_t batch, rows, batch_stride, row_stride;

  __device__ int at(int64_t sequence, int64_t row) const { return data[sequence * batch_stride + row * row_stride]; }
};

// Where a thread stands in its block's tile of vectors × rows × lanes.
struct Place {
  int column, row, lane;

  __device__ explicit Place(const Lanes& lanes)
      : column(threadIdx.x & ((1 << lanes.log_columns) - 1)),
        row((threadIdx.x >> lanes.log_columns) & ((1 << lanes.log_rows) - 1)),
        lane(threadIdx.x >> (lanes.log_columns + lanes.log_rows)) {}
};

__host__ __device__ inline int64_t tiles(int64_t size, int log_tile) {
  return (size + (1ll << log_tile) - 1) >> log_tile;
}

// Calls function(vector) with a value of the type in which this tensor is moved; the same for a whole block.
template <typename Function>
__device__ void with_vector(int log_vector, const Function& function) {
  switch (log_vector) {
    case 4: return function(uint4());
    case 3: return function(uint2());
    case 2: return function(uint32_t());
    case 1: return function(uint16_t());
    default: return function(uint8_t());
  }
}

// --- plan ------------------------------------------------------------------------------------------------------------

// A stable scan of one sequence per block. `limits`, if any, says how many of its tokens exist. Left padding scans from
// the end and fills from the end, so that a plan that is cut short loses its first kept rows.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const uint8_t* keep, int64_t keep_batch, int64_t keep_token, const int32_t* limits,
                int64_t limit_stride, int64_t tokens, int64_t rows, bool pad_left, int32_t* source, int32_t* lengths) {
  constexpr int kWarps = kPlanThreads / 32;
  __shared__ int counts[kWarps];
  const int64_t sequence = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  keep += sequence * keep_batch;
  source += sequence * rows;
  if (limits != nullptr) tokens = min(tokens, max(int64_t(0), int64_t(limits[sequence * limit_stride])));

  int64_t kept = 0;
  for (int64_t tile = 0; tile < tokens && kept < rows; tile += kPlanThreads * kPlanItems) {
    const int64_t first = tile + threadIdx.x * kPlanItems;
    unsigned flags = 0;
    for (int i = 0; i < kPlanItems && first + i < tokens; ++i) {
      const int64_t token = pad_left ? tokens - 1 - first - i : first + i;
      flags |= unsigned(keep[token * keep_token] != 0) << i;
    }
    int up_to_here = __popc(flags);  // in this warp
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, up_to_here, step);
      if (lane >= step) up_to_here += below;
    }
    if (lane == 31) counts[warp] = up_to_here;
    __syncthreads();  // every warp's count is there
    int total = 0, before = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = total;
      total += counts[w];
    }
    int64_t slot = kept + before + up_to_here - __popc(flags);
    for (int i = 0; i < kPlanItems; ++i) {
      if (!(flags >> i & 1)) continue;
      const int64_t token = pad_left ? tokens - 1 - first - i : first + i;
      if (slot < rows) source[pad_left ? rows - 1 - slot : slot] = static_cast<int32_t>(token);
      ++slot;
    }
    kept += total;
    __syncthreads();  // every warp has read the counts, which the next tile overwrites
  }
  kept = min(kept, rows);
  for (int64_t row = kept + threadIdx.x; row < rows; row += kPlanThreads) source[pad_left ? rows - 1 - row : row] = -1;
  if (threadIdx.x == 0) lengths[sequence] = static_cast<int32_t>(kept);
}

// inverse[row] = the slot that holds it, or -1: what turns expand into a gather. One sequence per block.
__global__ void __launch_bounds__(kPlanThreads) invert_kernel(Plan plan, int64_t length, int32_t* inverse) {
  const int64_t sequence = blockIdx.x;
  inverse += sequence * length;
  for (int64_t row = threadIdx.x; row < length; row += kPlanThreads) inverse[row] = -1;
  __syncthreads();  // a slot may name a row that another thread has yet to clear
  for (int64_t slot = threadIdx.x; slot < plan.rows; slot += kPlanThreads) {
    const int64_t row = plan.at(sequence, slot);
    if (0 <= row && row < length) inverse[row] = static_cast<int32_t>(slot);
  }
}

// --- gather ----------------------------------------------------------------------------------------------------------

// Rows that a thread has in flight: 64 bytes, which with 2048 threads on an SM is several times what its share of the
// memory's bandwidth needs to cover the latency.
constexpr int kGatherRows = 4, kLogGatherRows = 2;

template <typename Vector>
__device__ void gather_tile(const Lanes& lanes, const Plan& plan, int64_t tile) {
  const int64_t column_tiles = tiles(lanes.vectors, lanes.log_columns);
  const int64_t row_tiles = tiles(plan.rows, lanes.log_rows + kLogGatherRows);
  const int64_t lane_tiles = tiles(lanes.count, lanes.log_lanes);
  const Place place(lanes);
  const int64_t column = (tile % column_tiles << lanes.log_columns) + place.column;
  tile /= column_tiles;
  const int64_t first = (tile % row_tiles << (lanes.log_rows + kLogGatherRows)) + place.row;
  tile /= row_tiles;
  const int64_t lane = (tile % lane_tiles << lanes.log_lanes) + place.lane;
  const int64_t sequence = tile / lane_tiles;
  if (column >= lanes.vectors || lane >= lanes.count) return;

  int64_t from, to;
  lanes.locate(lane, from, to);
  from += sequence * lanes.from_batch + column * int64_t(sizeof(Vector));
  to += sequence * lanes.to_batch + column * int64_t(sizeof(Vector));
  Vector values[kGatherRows];
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) {
    const int64_t row = first + (int64_t(i) << lanes.log_rows);
    const int64_t source = row < plan.rows ? plan.at(sequence, row) : -1;
    values[i] = Vector();  // what a padding row holds
    if (0 <= source && source < lanes.limit) {
      values[i] = *reinterpret_cast<const Vector*>(lanes.from + from + source * lanes.from_row);
    }
  }
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) {
    const int64_t row = first + (int64_t(i) << lanes.log_rows);
    if (row < plan.rows) *reinterpret_cast<Vector*>(lanes.to + to + row * lanes.to_row) = values[i];
  }
}

template <int Capacity>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ Table<Capacity> table, Plan plan) {
  const Lanes& lanes = table.of_block(blockIdx.x);
  with_vector(lanes.log_vector,
              [&](auto vector) { gather_tile<decltype(vector)>(lanes, plan, blockIdx.x - lanes.first_block); });
}

// --- move ------------------------------------------------------------------------------------------------------------

// Rows that a thread holds between the load and the store of a step. A step is a round trip to memory, so it should be
// long; and where there is one narrow lane only, it is all that is in flight.
constexpr int kMoveRows = 8;

// Where logical rows lie: in which page (-1: in none, so that nothing is moved), and where in it.
struct DenseRows {
  static constexpr int kBlocksPerSM = 3;  // the most for which no register spills

  __device__ int page(const Lanes& lanes, int64_t, int64_t row) const { return 0 <= row && row < lanes.limit ? 0 : -1; }
  __device__ int64_t offset(const Lanes& lanes, int64_t sequence, int, int64_t row) const {
    return sequence * lanes.from_batch + row * lanes.from_row;
  }
};

struct PagedRows {
  static constexpr int kBlocksPerSM = 2;

  const int32_t* pages;
  int64_t columns, batch_stride, column_stride;
  int page_size;

  // Rows come from a plan, so they have 32 bits.
  __device__ int page(const Lanes& lanes, int64_t sequence, int row) const {
    const int column = row / page_size;
    if (row < 0 || column >= columns) return -1;
    const int page = pages[sequence * batch_stride + column * column_stride];
    return page < lanes.limit ? page : -1;
  }
  __device__ int64_t offset(const Lanes& lanes, int64_t, int page, int row) const {
    return page * lanes.from_batch + row % page_size * lanes.from_row;
  }
};

// The first row of [first, end) for which `holds` is false; it is true for all before it. The threads of a block search
// together: each round narrows the range to one of as many parts as there are threads.
template <typename Predicate>
__device__ int64_t first_without(int64_t first, int64_t end, const Predicate& holds) {
  while (first < end) {
    const int64_t part = (end - first + kThreads - 1) / kThreads;
    const int64_t probe = first + threadIdx.x * part;
    const int passed = __syncthreads_count(probe < end && holds(probe));
    if (passed == 0) break;
    end = min(end, first + passed * part);
    first += (passed - 1) * part + 1;
  }
  return first;
}

// One block owns a strip of columns of some lanes and walks its rows forward, so no two blocks share a byte and the
// order of blocks doesn't matter. Within the block, in steps of many rows: kept rows ascend, so row j comes from j or
// further back, and what a step has yet to read lies at or beyond the end of what all steps before it have written.
// Only the rows of one step overlap one another, hence the barrier between its loads and its stores.
template <typename Vector, typename Rows>
__device__ void move_strip(const Lanes& lanes, const Plan& plan, const Rows& rows, int64_t strip) {
  const int64_t column_tiles = tiles(lanes.vectors, lanes.log_columns);
  const int64_t lane_tiles = tiles(lanes.count, lanes.log_lanes);
  const Place place(lanes);
  const int64_t column = (strip % column_tiles << lanes.log_columns) + place.column;
  strip /= column_tiles;
  const int64_t lane = (strip % lane_tiles << lanes.log_lanes) + place.lane;
  const int64_t sequence = strip / lane_tiles;
  const bool mine = column < lanes.vectors && lane < lanes.count;

  int64_t offset, same;
  lanes.locate(lane, offset, same);
  char* base = lanes.to + offset + column * int64_t(sizeof(Vector));
  // What stands before the first dropped row stays as it is.
  const int64_t begin = first_without(0, plan.rows, [&](int64_t row) { return plan.at(sequence, row) == row; });
  const int64_t end = first_without(begin, plan.rows, [&](int64_t row) { return plan.at(sequence, row) >= 0; });

  for (int64_t step = begin; step < end; step += int64_t(kMoveRows) << lanes.log_rows) {
    // One kind of load at a time, for all rows: a row's index, its page and its bytes depend on one another, and must
    // not wait for those of the row before it as well.
    int sources[kMoveRows], from[kMoveRows], to[kMoveRows];
    Vector values[kMoveRows];
    const auto row_of = [&](int i) { return step + (int64_t(i) << lanes.log_rows) + place.row; };
#pragma unroll
    for (int i = 0; i < kMoveRows; ++i) sources[i] = mine && row_of(i) < end ? plan.at(sequence, row_of(i)) : -1;
#pragma unroll
    for (int i = 0; i < kMoveRows; ++i) {
      from[i] = rows.page(lanes, sequence, sources[i]);
      to[i] = from[i] < 0 ? -1 : rows.page(lanes, sequence, row_of(i));
    }
#pragma unroll
    for (int i = 0; i < kMoveRows; ++i) {
      if (from[i] < 0) continue;
      values[i] = *reinterpret_cast<const Vector*>(base + rows.offset(lanes, sequence, from[i], sources[i]));
    }
    __syncthreads();  // no row of this step is overwritten before all of them are read
#pragma unroll
    for (int i = 0; i < kMoveRows; ++i) {
      if (to[i] < 0) continue;
      *reinterpret_cast<Vector*>(base + rows.offset(lanes, sequence, to[i], row_of(i))) = values[i];
    }
  }
}

template <int Capacity, typename Rows>
__global__ void __launch_bounds__(kThreads, Rows::kBlocksPerSM)
    move_kernel(const __grid_constant__ Table<Capacity> table, Plan plan, Rows rows) {
  const Lanes& lanes = table.of_block(blockIdx.x);
  with_vector(lanes.log_vector,
              [&](auto vector) { move_strip<decltype(vector)>(lanes, plan, rows, blockIdx.x - lanes.first_block); });
}

// --- launches --------------------------------------------------------------------------------------------------------

inline int ceil_log2(int64_t size, int most) {
  int log = 0;
  while (log < most && (int64_t(1) << log) < size) ++log;
  return log;
}

// Lays out a block's threads over a tensor: as many columns as it has, at most `most_columns`, then rows, then lanes.
inline void lay_out(Lanes& lanes, int most_columns, int64_t rows) {
  lanes.log_columns = ceil_log2(lanes.vectors, most_columns);
  lanes.log_rows = ceil_log2(rows, kLogThreads - lanes.log_columns);
  lanes.log_lanes = kLogThreads - lanes.log_columns - lanes.log_rows;
}

inline bool large_arguments() {
#ifdef __CUDACC__
  static const bool large = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
  }();
  return large;
#else
  return true;
#endif
}

// Calls launch(table, blocks) for as few tables as hold the list. blocks_of: how many blocks work on a tensor; none
// work on more than 2^31 - 1, as that would be terabytes.
template <typename BlocksOf, typename Launch>
void for_each_table(const std::vector<Lanes>& list, const BlocksOf& blocks_of, const Launch& launch) {
  const auto fill = [&](auto table, size_t& next) {
    constexpr int64_t capacity = sizeof(table.lanes) / sizeof(Lanes);
    int64_t blocks = 0;
    table.count = 0;
    for (; next < list.size() && table.count < capacity; ++next) {
      const int64_t more = blocks_of(list[next]);
      if (blocks + more > INT32_MAX) break;
      Lanes& lanes = table.lanes[table.count++] = list[next];
      lanes.first_block = blocks;
      blocks += more;
    }
    launch(table, dim3(static_cast<unsigned>(blocks)));
  };
  for (size_t next = 0; next < list.size();) {
    const size_t left = list.size() - next;
    if (left <= kSmallTable || !large_arguments()) {
      fill(Table<kSmallTable>(), next);
    } else if (left <= kMediumTable) {
      fill(Table<kMediumTable>(), next);
    } else {
      fill(Table<kLargeTable>(), next);
    }
  }
}

inline void plan(const uint8_t* keep, int64_t keep_batch, int64_t keep_token, const int32_t* limits,
                 int64_t limit_stride, int64_t batch, int64_t tokens, int64_t rows, bool pad_left, int32_t* source,
                 int32_t* lengths, cudaStream_t stream) {
  if (batch == 0) return;
  launch(plan_kernel, dim3(batch), dim3(kPlanThreads), stream, keep, keep_batch, keep_token, limits, limit_stride,
         tokens, rows, pad_left, source, lengths);
}

inline void invert(const Plan& plan, int64_t length, int32_t* inverse, cudaStream_t stream) {
  if (plan.batch == 0 || length == 0) return;
  launch(invert_kernel, dim3(plan.batch), dim3(kPlanThreads), stream, plan, length, inverse);
}

// Every tensor of the list has elements, and so has the plan.
inline void gather(std::vector<Lanes> list, const Plan& plan, cudaStream_t stream) {
  for (Lanes& lanes : list) lay_out(lanes, kLogThreads, tiles(plan.rows, kLogGatherRows));
  const auto blocks = [&](const Lanes& lanes) {
    return plan.batch * tiles(lanes.count, lanes.log_lanes) * tiles(plan.rows, lanes.log_rows + kLogGatherRows) *
           tiles(lanes.vectors, lanes.log_columns);
  };
  for_each_table(list, blocks, [&](const auto& table, dim3 grid) {
    constexpr int capacity = sizeof(table.lanes) / sizeof(Lanes);
    launch(gather_kernel<capacity>, grid, dim3(kThreads), stream, table, plan);
  });
}

// A strip is 256 bytes wide, which is a head of most models. Where that makes too few strips to keep a large GPU busy,
// they are narrowed, down to the 64 bytes that memory hands out at a time.
constexpr int64_t kEnoughStrips = 4 * 132;

template <typename Rows>
void move(std::vector<Lanes> list, const Plan& plan, const Rows& rows, cudaStream_t stream) {
  const auto blocks = [&](const Lanes& lanes) {
    return plan.batch * tiles(lanes.count, lanes.log_lanes) * tiles(lanes.vectors, lanes.log_columns);
  };
  for (int log_bytes = 8; log_bytes >= 6; --log_bytes) {
    int64_t strips = 0;
    for (Lanes& lanes : list) {
      lay_out(lanes, std::max(0, log_bytes - lanes.log_vector), tiles(plan.rows, 3));
      strips += blocks(lanes);
    }
    if (strips >= kEnoughStrips) break;
  }
  for_each_table(list, blocks, [&](const auto& table, dim3 grid) {
    constexpr int capacity = sizeof(table.lanes) / sizeof(Lanes);
    launch(move_kernel<capacity, Rows>, grid, dim3(kThreads), stream, table, plan, rows);
  });
}

}  // namespace vtw::cuda
