// Compaction on the GPU: plan, packed plan, gather (compact, expand) and move (compact_, compact_paged_).
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
constexpr int kPlanThreads = 512, kPlanItems = 16;

// --- descriptors -----------------------------------------------------------------------------------------------------

// Divides what is below 2^31 by a number that the host knows: a multiplication and a shift. (Granlund and Montgomery,
// Division by Invariant Integers using Multiplication, 1994.)
struct Divisor {
  uint32_t size = 1, magic = (1u << 31) + 1;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t divisor) : size(static_cast<uint32_t>(divisor)) {
    while ((int64_t(1) << (shift - 31)) < divisor) ++shift;
    magic = static_cast<uint32_t>((uint64_t(1) << shift) / size + 1);
  }
  // Returns the remainder and leaves the quotient.
  __device__ uint32_t take(uint32_t& n) const {
    const uint32_t whole = n;
    n = static_cast<uint32_t>(uint64_t(whole) * magic >> shift);
    return whole - n * size;
  }
};

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
  int8_t log_vector;                               // bytes of a vector
  int8_t log_columns, log_rows, log_lanes;         // how a block's threads are laid out: vectors × rows × lanes
  Divisor column_tiles, lane_tiles;

  __device__ void locate(int64_t lane, int64_t& from_offset, int64_t& to_offset) const {
    from_offset = to_offset = 0;
#pragma unroll 1
    for (int d = 0; d < kDims; ++d) {
      const bool last = lane < dims[d].size;  // most often the first is, and nothing is divided
      const int64_t index = last ? lane : lane % dims[d].size;
      from_offset += index * dims[d].from_stride;
      to_offset += index * dims[d].to_stride;
      if (last) break;
      lane /= dims[d].size;
    }
  }
};

// A kernel's arguments may take 4 KB, and 32 KB from CUDA 12.1 on; a launch takes the smallest table that fits.
constexpr int kSmallTable = 20, kMediumTable = 80, kLargeTable = 176;

template <int Capacity>
struct Table {
  int32_t count;
  int32_t first_block[Capacity];  // of the blocks, or of the strips, the first that is of each tensor
  Lanes lanes[Capacity];

  // The tensor that a block or a strip is of.
  __device__ int of_block(int block) const {
    int first = 0;
    for (int last = count - 1; first < last;) {
      const int middle = (first + last + 1) / 2;
      if (first_block[middle] <= block) {
        first = middle;
      } else {
        last = middle - 1;
      }
    }
    return first;
  }
};
static_assert(sizeof(Table<kSmallTable>) <= 4096 - 256 && sizeof(Table<kLargeTable>) <= 32764 - 256);

// Rows of each sequence, as plan_compaction gives them.
struct Plan {
  const int32_t* data;
  int64_t batch, rows, batch_stride, row_stride;

  __device__ int at(int64_t sequence, int64_t row) const { return data[sequence * batch_stride + row * row_stride]; }
};

__host__ __device__ inline int64_t tiles(int64_t size, int log_tile) {
  return (size + (1ll << log_tile) - 1) >> log_tile;
}

// Returns function(vector) of a value of the type in which this tensor is moved; the same for a whole block.
template <typename Function>
__device__ auto with_vector(int log_vector, const Function& function) {
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

  // The i-th flag that is scanned, and the slot of the i-th row that is kept, counted from one end or the other.
  const auto token_of = [&](int64_t i) { return pad_left ? tokens - 1 - i : i; };
  const auto slot_of = [&](int64_t i) { return pad_left ? rows - 1 - i : i; };
  const int64_t step = pad_left ? -1 : 1;

  int64_t kept = 0;
  for (int64_t tile = 0; tile < tokens && kept < rows; tile += kPlanThreads * kPlanItems) {
    const int64_t first = tile + threadIdx.x * kPlanItems;
    const int count = static_cast<int>(max(int64_t(0), min(int64_t(kPlanItems), tokens - first)));
    unsigned flags = 0;
    int64_t at = token_of(first) * keep_token;
#pragma unroll  // all loads are on their way before the first is looked at
    for (int i = 0; i < kPlanItems; ++i, at += step * keep_token) flags |= unsigned(i < count && keep[at] != 0) << i;
    const int own = __popc(flags);
    int up_to_here = own;  // in this warp
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int below = __shfl_up_sync(~0u, up_to_here, lanes);
      if (lane >= lanes) up_to_here += below;
    }
    if (lane == 31) counts[warp] = up_to_here;
    __syncthreads();  // every warp's count is there
    int total = 0, before = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) before = total;
      total += counts[w];
    }
    const int64_t slot = kept + before + up_to_here - own;
    int room = static_cast<int>(min(int64_t(own), rows - slot));
    int32_t* to = source + slot_of(slot);
    int token = static_cast<int>(token_of(first));
    for (; flags != 0 && room > 0; flags >>= 1, token += static_cast<int>(step)) {
      if (flags % 2 == 0) continue;
      *to = token;
      to += step;
      --room;
    }
    kept += total;
    __syncthreads();  // every warp has read the counts, which the next tile overwrites
  }
  kept = min(kept, rows);
  for (int64_t row = kept + threadIdx.x; row < rows; row += kPlanThreads) source[slot_of(row)] = -1;
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

// --- packed plan -----------------------------------------------------------------------------------------------------

// The arguments and results of plan_packed_, in the order of its schema.
struct Packed {
  const int32_t *query_start, *seq_lens, *visual, *visual_start, *table;
  int64_t batch, ranges, columns, table_batch, table_column, block_size, capacity;
  int32_t *source, *text_start, *text_lens;
  int64_t* slots;

  // How many of a sequence's first `tokens` tokens are text; and, as it costs nothing more, whether the next one is.
  __device__ int64_t text(int64_t sequence, int64_t tokens, bool* is_text = nullptr) const {
    const int64_t first = max(0, visual_start[sequence]), last = min(int64_t(visual_start[sequence + 1]), ranges);
    int64_t count = tokens;
    bool hidden = false;
    for (int64_t i = first; i < last; ++i) {
      const int64_t start = visual[2 * i], stop = visual[2 * i + 1];
      count -= max(int64_t(0), min(stop, tokens) - start);
      hidden |= start <= tokens && tokens < stop;
    }
    if (is_text != nullptr) *is_text = !hidden;
    return count;
  }
  __device__ int64_t rows(int64_t sequence) const { return int64_t(query_start[sequence + 1]) - query_start[sequence]; }
  __device__ int64_t slot(int64_t sequence, int64_t t) const {
    const int64_t column = t / block_size;
    if (t < 0 || column >= columns) return -1;
    const int64_t block = table[sequence * table_batch + column * table_column];
    return block < 0 ? -1 : block * block_size + t % block_size;
  }
};

// One sequence per block. Each block adds up the text rows of the sequences before its own by itself, so that no block
// waits for another; and each thread counts where its row goes. The ranges are few, and in the cache.
__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Packed packed) {
  __shared__ unsigned sums[2];  // text rows of the sequences before, and of all
  const int64_t sequence = blockIdx.x;
  if (threadIdx.x < 2) sums[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < packed.batch; b += kThreads) {
    const int64_t length = packed.seq_lens[b];
    const unsigned rows = static_cast<unsigned>(packed.text(b, length) - packed.text(b, length - packed.rows(b)));
    if (b < sequence) atomicAdd(&sums[0], rows);
    atomicAdd(&sums[1], rows);
  }
  __syncthreads();
  const int64_t before = sums[0], all = sums[1];
  if (sequence == 0 && threadIdx.x == 0) packed.text_start[0] = 0;
  if (sequence < packed.batch) {
    const int64_t length = packed.seq_lens[sequence], begin = length - packed.rows(sequence);
    const int64_t text_before = packed.text(sequence, begin);
    if (threadIdx.x == 0) {
      const int64_t text = packed.text(sequence, length);
      packed.text_lens[sequence] = static_cast<int32_t>(text);
      packed.text_start[sequence + 1] = static_cast<int32_t>(before + text - text_before);
    }
    // Not more than there is room for, whatever the values are.
    for (int64_t i = threadIdx.x; i < min(length - begin, packed.capacity); i += kThreads) {
      bool is_text;
      const int64_t t = packed.text(sequence, begin + i, &is_text), to = before + t - text_before;
      if (!is_text || to < 0 || to >= packed.capacity) continue;
      packed.source[to] = static_cast<int32_t>(packed.query_start[sequence] + i);
      packed.slots[to] = packed.slot(sequence, t);
    }
  }
  for (int64_t to = all + sequence * kThreads + threadIdx.x; to < packed.capacity;
       to += int64_t(gridDim.x) * kThreads) {
    packed.source[to] = -1;
    packed.slots[to] = -1;
  }
}

// --- gather and move -------------------------------------------------------------------------------------------------

// A block moves a tile of rows × columns of some lanes, in three steps: it works out where the rows of the tile are,
// once for all columns and lanes; loads; stores. A thread has the bytes of several rows in flight at a time.
//
// Out of place, tiles have nothing to do with one another, and each has a block. In place, a row may lie where another
// tile has yet to read. Kept rows ascend, so row j comes from j or further back: what a tile overwrites is read by
// itself or by tiles of earlier rows. So it stores once all its own threads, and all tiles with earlier rows of the
// same *strip*, which is the same lanes and columns, have loaded; no data takes a detour through other memory.

// Where a row comes from and where it goes: offsets from the first row of a lane, in bytes. Negative: nothing to load,
// or to store.
struct alignas(16) Way {
  int64_t from, to;
};

// Rows of new tensors. `kRows` of a thread are in flight: 64 bytes, which with 1536 threads on an SM is several times
// what its share of the memory's bandwidth needs to cover the latency.
struct GatheredRows {
  static constexpr int kRows = 4, kBlocksPerSM = 6;
  static constexpr bool kInPlace = false;

  __device__ Way way(const Lanes& lanes, const Plan& plan, int64_t sequence, int64_t row) const {
    if (row >= plan.rows) return {-1, -1};
    const int source = plan.at(sequence, row);
    const bool read = 0 <= source && source < lanes.limit;  // what is not is a padding row, which holds 0
    return {read ? sequence * lanes.from_batch + source * lanes.from_row : -1,
            sequence * lanes.to_batch + row * lanes.to_row};
  }
};

// Rows that move within their tensors. Those that stay, before the first one dropped, are not touched; nor is anything
// that does not exist.
struct DenseRows {
  static constexpr int kRows = 8, kBlocksPerSM = 4;
  static constexpr bool kInPlace = true;

  __device__ Way way(const Lanes& lanes, const Plan& plan, int64_t sequence, int64_t row) const {
    const int source = row < plan.rows ? plan.at(sequence, row) : -1;
    if (source < 0 || source == row || source >= lanes.limit || row >= lanes.limit) return {-1, -1};
    const int64_t base = sequence * lanes.from_batch;
    return {base + source * lanes.from_row, base + row * lanes.from_row};
  }
};

struct PagedRows {
  static constexpr int kRows = 8, kBlocksPerSM = 4;
  static constexpr bool kInPlace = true;

  const int32_t* pages;
  int64_t columns, batch_stride, column_stride;
  Divisor page_size;

  // Where a logical row lies, or -1 if it is in no page.
  __device__ int64_t offset(const Lanes& lanes, int64_t sequence, uint32_t row) const {
    uint32_t column = row;
    const uint32_t slot = page_size.take(column);
    if (column >= columns) return -1;
    const int page = pages[sequence * batch_stride + column * column_stride];
    return page < 0 || page >= lanes.limit ? -1 : page * lanes.from_batch + slot * lanes.from_row;
  }
  __device__ Way way(const Lanes& lanes, const Plan& plan, int64_t sequence, int64_t row) const {
    const int source = row < plan.rows ? plan.at(sequence, row) : -1;
    if (source < 0 || source == row) return {-1, -1};
    const Way way{offset(lanes, sequence, source), offset(lanes, sequence, static_cast<uint32_t>(row))};
    return way.from < 0 || way.to < 0 ? Way{-1, -1} : way;
  }
};

// If a strip has several tiles, in place: a few blocks take tile after tile, those of earlier rows first, until no rows
// are left; how many there are, only the device knows. A tile waits only for tiles that were taken before it, so there
// is always progress, however few blocks run at once.
struct Turns {
  unsigned* next;    // how many tiles have been taken
  unsigned* loaded;  // [tiles of all strips], 1 once a tile will read no more
  Divisor strips;    // of all tensors
  unsigned tiles;    // of a strip

  // Called by one thread of a block.
  __device__ unsigned take() const { return atomicAdd(next, 1u); }
  __device__ void publish(unsigned turn) const {
    if (turn >= strips.size * tiles) return;
    __threadfence();  // the loads come first
    *reinterpret_cast<volatile unsigned*>(&loaded[turn]) = 1;
  }
  // Called by all threads: waits until the tiles of earlier rows have loaded.
  __device__ void wait(unsigned turn) const {
    for (unsigned earlier = turn % strips.size + threadIdx.x * strips.size; earlier < turn;
         earlier += kThreads * strips.size) {
      while (*reinterpret_cast<const volatile unsigned*>(&loaded[earlier]) == 0) __nanosleep(20);
      __threadfence();  // the stores come last
    }
    __syncthreads();
  }
};

// How many rows a tile moves at once, at most. With this limit no thread has to work out the place of more than one
// row; in place it is the number of rows beside 16 columns, which is the most there are.
template <typename Rows>
constexpr int kMostPlaces = Rows::kInPlace ? 16 : kThreads / Rows::kRows;
template <typename Rows>
constexpr int64_t kMostHeight = kMostPlaces<Rows> * Rows::kRows;

// The ways of a tile's rows: by the step of a thread's loop, and by the row's place among the rows that are moved at
// once. One more place, with nothing to move, is for threads beyond the columns or lanes.
template <typename Rows>
using Ways = Way[Rows::kRows][kMostPlaces<Rows> + 1];

// Moves a tile: `place` is that among the strips of a tensor, or out of place among its tiles, strips first. Returns
// false if neither this tile nor any with later rows has something to move.
template <typename Vector, bool kInTurns, typename Rows>
__device__ bool move_tile(const Lanes& lanes, const Plan& plan, const Rows& rows, const Divisor& batch, uint32_t place,
                          uint32_t tile, const Turns& turns, uint32_t turn, Ways<Rows>& ways) {
  const int log_columns = lanes.log_columns, log_rows = lanes.log_rows;
  const int64_t column = (int64_t(lanes.column_tiles.take(place)) << log_columns) + threadIdx.x % (1 << log_columns);
  const int64_t lane =
      (int64_t(lanes.lane_tiles.take(place)) << lanes.log_lanes) + (threadIdx.x >> (log_columns + log_rows));
  const int64_t sequence = batch.take(place);
  const uint32_t height = uint32_t(Rows::kRows) << log_rows;
  const int64_t first = int64_t(Rows::kInPlace ? tile : place) * height;

  bool something = false;
  if (threadIdx.x < height) {
    const Way way = rows.way(lanes, plan, sequence, first + threadIdx.x);
    ways[threadIdx.x >> log_rows][threadIdx.x % (1 << log_rows)] = way;
    something = way.to >= 0;
  }
  if (threadIdx.x < Rows::kRows) ways[threadIdx.x][kMostPlaces<Rows>] = {-1, -1};
  if (!__syncthreads_or(something)) {  // the ways are there
    if (!kInTurns) return false;
    if (threadIdx.x == 0) turns.publish(turn);
    bool more = false;
    for (int64_t i = threadIdx.x; i < plan.batch; i += kThreads) more |= plan.at(i, first) >= 0;
    return __syncthreads_or(more);
  }

  int64_t from, to;
  lanes.locate(lane, from, to);
  const char* const source = lanes.from + from + column * int64_t(sizeof(Vector));
  char* const target = lanes.to + to + column * int64_t(sizeof(Vector));
  const bool mine = column < lanes.vectors && lane < lanes.count;
  const int row = mine ? (threadIdx.x >> log_columns) % (1 << log_rows) : kMostPlaces<Rows>;
  Vector values[Rows::kRows];
#pragma unroll
  for (int i = 0; i < Rows::kRows; ++i) {
    // What a padding row holds; and where a block moves many tiles, what is not loaded must not be kept from the last.
    if (!Rows::kInPlace || kInTurns) values[i] = Vector();
    const int64_t offset = ways[i][row].from;
    if (offset >= 0) values[i] = *reinterpret_cast<const Vector*>(source + offset);
  }
  if (Rows::kInPlace) __syncthreads();  // no row of this tile is overwritten before all of them are read
  if (kInTurns) {
    if (threadIdx.x == 0) turns.publish(turn);
    turns.wait(turn);
  }
#pragma unroll
  for (int i = 0; i < Rows::kRows; ++i) {
    const int64_t offset = ways[i][row].to;
    if (offset >= 0) *reinterpret_cast<Vector*>(target + offset) = values[i];
  }
  return true;
}

template <int Capacity, typename Rows, bool kInTurns>
__global__ void __launch_bounds__(kThreads, Rows::kBlocksPerSM)
    move_kernel(const __grid_constant__ Table<Capacity> table, const __grid_constant__ Plan plan,
                const __grid_constant__ Rows rows, const __grid_constant__ Turns turns, Divisor batch) {
  __shared__ Ways<Rows> ways;
  const auto move = [&](uint32_t strip, uint32_t tile, uint32_t turn) {
    const int tensor = table.of_block(strip);
    const Lanes& lanes = table.lanes[tensor];
    const uint32_t place = strip - table.first_block[tensor];
    return with_vector(lanes.log_vector, [&](auto vector) {
      return move_tile<decltype(vector), kInTurns>(lanes, plan, rows, batch, place, tile, turns, turn, ways);
    });
  };
  if constexpr (!kInTurns) {
    move(blockIdx.x, 0, 0);
    return;
  }
  __shared__ unsigned taken;
  unsigned next = threadIdx.x == 0 ? turns.take() : 0;
  while (true) {
    if (threadIdx.x == 0) taken = next;
    __syncthreads();  // the number is there, and everybody is done with the last tile
    const unsigned turn = taken;
    if (turn >= turns.strips.size * turns.tiles) return;
    if (threadIdx.x == 0) next = turns.take();  // on its way while this tile is moved
    uint32_t tile = turn;
    const uint32_t strip = turns.strips.take(tile);
    if (!move(strip, tile, turn)) break;
  }
  // This block leaves with a tile that it has taken but that is not needed. It is marked as loaded, so that no block
  // can wait for it, whatever the values of a plan are.
  if (threadIdx.x == 0) turns.publish(next);
}

// --- launches --------------------------------------------------------------------------------------------------------

inline int ceil_log2(int64_t size, int most) {
  int log = 0;
  while (log < most && (int64_t(1) << log) < size) ++log;
  return log;
}

// Lays out a block's threads over a tensor: as many columns as it has, at most 2^most_columns, then rows, then lanes.
template <typename Rows>
void lay_out(Lanes& lanes, int most_columns, int64_t rows) {
  lanes.log_columns = ceil_log2(lanes.vectors, most_columns);
  lanes.log_rows = 0;
  while (Rows::kRows << lanes.log_rows < rows && lanes.log_rows < kLogThreads - lanes.log_columns &&
         1 << lanes.log_rows < kMostPlaces<Rows>) {
    ++lanes.log_rows;
  }
  lanes.log_lanes = kLogThreads - lanes.log_columns - lanes.log_rows;
  lanes.column_tiles = Divisor(tiles(lanes.vectors, lanes.log_columns));
  lanes.lane_tiles = Divisor(tiles(lanes.count, lanes.log_lanes));
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
    constexpr int capacity = sizeof(table.lanes) / sizeof(Lanes);
    int64_t blocks = 0;
    table.count = 0;
    for (; next < list.size() && table.count < capacity; ++next) {
      const int64_t more = blocks_of(list[next]);
      if (blocks + more > INT32_MAX) break;
      table.lanes[table.count] = list[next];
      table.first_block[table.count++] = static_cast<int32_t>(blocks);
      blocks += more;
    }
    launch(table, static_cast<unsigned>(blocks));
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

// Without a sequence, one block fills the plan with -1.
inline void pack(const Packed& packed, cudaStream_t stream) {
  launch(pack_kernel, dim3(std::max<int64_t>(packed.batch, 1)), dim3(kThreads), stream, packed);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t strips_of(const Lanes& lanes, int64_t batch) {
  return batch * lanes.lane_tiles.size * lanes.column_tiles.size;
}

// Every tensor of the list has elements, and so has the plan.
//
// Tiles are as high as a block can make them, or lower if that leaves less of them empty: for 85 rows, 3 tiles of 32
// rows of 2 heads each are fewer blocks than 2 tiles of 64 rows of one head each.
inline void gather(std::vector<Lanes> list, const Plan& plan, cudaStream_t stream) {
  using Rows = GatheredRows;
  const auto blocks_of = [&](const Lanes& lanes) {
    return strips_of(lanes, plan.batch) * ceil_div(plan.rows, Rows::kRows << lanes.log_rows);
  };
  for (Lanes& lanes : list) {
    lay_out<Rows>(lanes, kLogThreads, plan.rows);
    const int highest = lanes.log_rows;
    for (int log_rows = highest - 1; log_rows >= std::max(0, highest - 2); --log_rows) {
      Lanes lower = lanes;
      lay_out<Rows>(lower, kLogThreads, Rows::kRows << log_rows);
      if (blocks_of(lower) < blocks_of(lanes)) lanes = lower;
    }
  }
  const Divisor batch(std::max<int64_t>(plan.batch, 1));
  for_each_table(list, blocks_of, [&](const auto& table, unsigned blocks) {
    constexpr int capacity = sizeof(table.lanes) / sizeof(Lanes);
    launch(move_kernel<capacity, Rows, false>, blocks, kThreads, stream, table, plan, Rows(), Turns(), batch);
  });
}

// Strips are 256 bytes wide, which is a head of most models. Where that makes too few tiles to keep a large GPU busy
// they are narrowed, though not below the 128 bytes of a line of its cache. All tensors have tiles of the same height.
constexpr int kMultiprocessors = 132, kLogMostColumns = 4;

// clear(n) returns n zeros on the device, for use in this stream; it is not called where strips have one tile only.
template <typename Rows, typename Clear>
void move(std::vector<Lanes> list, const Plan& plan, const Rows& rows, Clear&& clear, cudaStream_t stream) {
  if (list.empty() || plan.batch == 0 || plan.rows == 0) return;
  int64_t tiles = 0;
  for (int log_bytes = 8; log_bytes >= 7; --log_bytes) {
    int64_t strips = 0;
    for (Lanes& lanes : list) {
      const int columns = std::max(0, log_bytes - lanes.log_vector);
      lay_out<Rows>(lanes, std::min(columns, kLogMostColumns), std::min(plan.rows, kMostHeight<Rows>));
      strips += strips_of(lanes, plan.batch);
    }
    tiles = ceil_div(plan.rows, Rows::kRows << list[0].log_rows);
    if (strips * tiles >= kMultiprocessors) break;
  }
  const Divisor batch(plan.batch);
  const auto blocks_of = [&](const Lanes& lanes) { return strips_of(lanes, plan.batch); };
  for_each_table(list, blocks_of, [&](const auto& table, unsigned strips) {
    constexpr int capacity = sizeof(table.lanes) / sizeof(Lanes);
    if (tiles == 1) {
      launch(move_kernel<capacity, Rows, false>, strips, kThreads, stream, table, plan, rows, Turns(), batch);
      return;
    }
    unsigned* const zeros = clear(strips * tiles + 1);
    const Turns turns{zeros, zeros + 1, Divisor(strips), static_cast<unsigned>(tiles)};
    const unsigned blocks = std::min<int64_t>(strips * tiles, kMultiprocessors * Rows::kBlocksPerSM);
    launch(move_kernel<capacity, Rows, true>, blocks, kThreads, stream, table, plan, rows, turns, batch);
  });
}

}  // namespace vtw::cuda
