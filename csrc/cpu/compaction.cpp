// Compaction on the CPU: plan_compaction, compact, compact_, expand, compact_paged_, plan_packed_.
//
// A plan is first turned into *runs* of consecutive rows (a withdrawn image leaves two: what stands before it and what
// stands after), so that most of a tensor moves in a few large copies. The list is then cut into tasks of about equal
// size, which threads share.

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "allocate.h"
#include "cpu/simd.h"
#include "lanes.h"
#include "overlap.h"

namespace vtw {
namespace {

// A task moves at least this much, to hide the cost of starting it.
constexpr int64_t kTaskBytes = 32 * 1024;
// There are about so many tasks for each thread, so that threads get equal shares.
constexpr int64_t kTasksPerThread = 16;
// In place, a task is a whole lane. A lane with more bytes than this is split by columns, although that costs locality.
constexpr int64_t kLaneBytes = 128 * 1024;
// Such strips of columns are no narrower than this.
constexpr int64_t kStripBytes = 2 * 1024;
// A thread moves at least this much, which takes 50 to 100 microseconds. A smaller share gains little if a core is
// idle; and if another process has the core, the op waits milliseconds for that process's turn to end.
constexpr int64_t kSerialBytes = 512 * 1024;
// How far ahead a long run is prefetched while it is copied around the caches.
constexpr int64_t kAheadBytes = 4 * 1024;

// `count` rows from `from` go to `to`; from = -1 is a run of zero rows.
struct Run {
  int64_t from;
  int64_t to;
  int64_t count;
};

using Runs = std::vector<std::vector<Run>>;  // per sequence, ascending in `to`

struct Source {
  const int32_t* data;
  int64_t batch, rows, batch_stride, row_stride;

  explicit Source(const Tensor& source)
      : data(static_cast<const int32_t*>(source.const_data_ptr())),
        batch(source.size(0)),
        rows(source.size(1)),
        batch_stride(source.stride(0)),
        row_stride(source.stride(1)) {}

  int32_t at(int64_t b, int64_t j) const { return data[b * batch_stride + j * row_stride]; }
};

// The runs of each sequence, as long as possible; padding makes runs as well.
Runs compact_runs(const Source& source) {
  Runs runs(source.batch);
  for (int64_t b = 0; b < source.batch; ++b) {
    for (int64_t j = 0; j < source.rows;) {
      const int64_t row = source.at(b, j), step = row < 0 ? 0 : 1;
      int64_t count = 1;
      while (j + count < source.rows && source.at(b, j + count) == row + count * step) ++count;
      runs[b].push_back({row, j, count});
      j += count;
    }
  }
  return runs;
}

// The rows of a sequence ascend, with padding on one side, and lie below `limit`.
template <typename LimitOf>
void check_runs(Op which, const Runs& runs, int64_t limit, const LimitOf& limit_of) {
  const char* op = op_name(which);
  for (const auto& sequence : runs) {
    int64_t previous = -1;
    bool padding_after = false;
    for (const Run& run : sequence) {
      VTW_REQUIRE(run.from >= -1, op, "source", "rows, or -1 for padding", text(run.from));
      if (run.from < 0) {
        padding_after = previous >= 0;
        continue;
      }
      const int64_t last = run.from + run.count - 1;
      VTW_REQUIRE(last < limit, op, "source", text("rows below ", limit, " of ", limit_of()),
                  text(std::max(run.from, limit)));
      VTW_REQUIRE(run.from > previous && !padding_after, op, "source", "ascending rows with padding on one side",
                  "another order");
      const bool padding_before = previous < 0 && run.to > 0;
      VTW_REQUIRE(!(padding_before && which == Op::kCompactInPlace), op, "source", "a right-padded plan",
                  "a left-padded one");
      previous = last;
    }
  }
}

// The same for a list: rows that are in range for the shortest tensor are in range for all.
void check_runs(Op which, const Runs& runs, const std::vector<Tensor>& tensors, const std::vector<TokenDims>& dims) {
  size_t shortest = 0;
  for (size_t i = 1; i < tensors.size(); ++i) {
    if (tensors[i].size(dims[i].token) < tensors[shortest].size(dims[shortest].token)) shortest = i;
  }
  if (tensors.empty()) return;
  check_runs(which, runs, tensors[shortest].size(dims[shortest].token),
             [&] { return text("tensors[", shortest, "]"); });
}

// The inverse of checked runs, for expand: rows that were dropped are runs of zeros.
Runs expand_runs(const Runs& compacted, int64_t length) {
  Runs runs(compacted.size());
  for (size_t b = 0; b < runs.size(); ++b) {
    int64_t next = 0;
    const auto clear_until = [&](int64_t row) {
      if (next < row) runs[b].push_back({-1, next, row - next});
    };
    for (const Run& run : compacted[b]) {
      if (run.from < 0) continue;
      clear_until(run.from);
      runs[b].push_back({run.to, run.from, run.count});
      next = run.from + run.count;
    }
    clear_until(length);
  }
  return runs;
}

template <int64_t Bytes>
void copy_elements(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * to_row, from + r * from_row, Bytes);
}

// Copies forward: `to` is below `from` or apart from it, and each block is loaded before the stores that may overwrite
// it. If `ahead` is not 0, what lies that many bytes further on is prefetched: runs are short, and the processor's own
// prefetcher would start again in each of them. Not memmove, because glibc's uses `rep movsb`, which on Zen 4 is up to
// six times slower if `to`, within its page, lies less than a cache line after `from` within its own.
template <int Bytes>
VTW_INLINE void copy_by(char* to, const char* from, int64_t bytes, int64_t ahead) {
  using Vector = typename Vectors<Bytes>::U;
  const auto load = [&](int64_t at) { return Simd<Bytes>::template read<Vector>(from + at); };
  const auto store = [&](int64_t at, Vector x) { std::memcpy(to + at, &x, Bytes); };
  int64_t i = 0;
  for (; i + 4 * Bytes <= bytes; i += 4 * Bytes) {
    if (ahead) {
      for (int64_t line = i; line < i + 4 * Bytes; line += 64) __builtin_prefetch(from + ahead + line, 0, 2);
    }
    const Vector a = load(i), b = load(i + Bytes), c = load(i + 2 * Bytes), d = load(i + 3 * Bytes);
    store(i, a), store(i + Bytes, b), store(i + 2 * Bytes, c), store(i + 3 * Bytes, d);
  }
  std::memmove(to + i, from + i, bytes - i);
}

#if defined(__x86_64__)
VTW_AVX2 void copy_avx2(char* to, const char* from, int64_t bytes, int64_t ahead) {
  copy_by<32>(to, from, bytes, ahead);
}
#endif

void copy(char* to, const char* from, int64_t bytes, int64_t ahead) {
#if defined(__x86_64__)
  if (cpu_capability() != CpuCapability::kDefault) return copy_avx2(to, from, bytes, ahead);
#endif
  copy_by<16>(to, from, bytes, ahead);
}

// The same with stores that go around the caches.
void stream(char* to, const char* from, int64_t bytes, int64_t ahead) {
  using V = Simd<16>;
  const auto load = [&](int64_t at) { return V::read<V::F>(from + at); };
  int64_t i = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 63);
  std::memmove(to, from, i);
  for (; i + 64 <= bytes; i += 64) {
    __builtin_prefetch(from + ahead + i, 0, 2);
    const V::F a = load(i), b = load(i + 16), c = load(i + 32), d = load(i + 48);
    V::stream(to + i, a), V::stream(to + i + 16, b), V::stream(to + i + 32, c), V::stream(to + i + 48, d);
  }
  std::memmove(to + i, from + i, bytes - i);
}

// Rows go forward, and in place `to` never lies above `from`: a row is read before anything is written over it. A run
// and the place it moves to may overlap, and so may a row and its neighbour's old place.
void move_rows(char* to, int64_t to_row, const char* from, int64_t from_row, int64_t rows, int64_t bytes, int64_t ahead,
               bool around_caches) {
  const auto move = around_caches ? stream : copy;
  if (from_row == bytes && to_row == bytes) return move(to, from, rows * bytes, ahead);
  switch (bytes) {
    case 1: return copy_elements<1>(to, to_row, from, from_row, rows);
    case 2: return copy_elements<2>(to, to_row, from, from_row, rows);
    case 4: return copy_elements<4>(to, to_row, from, from_row, rows);
    case 8: return copy_elements<8>(to, to_row, from, from_row, rows);
    default:
      for (int64_t r = 0; r < rows; ++r) {
        move(to + r * to_row, from + r * from_row, bytes, ahead);
      }
  }
}

void clear_rows(char* to, int64_t to_row, int64_t rows, int64_t bytes) {
  if (to_row == bytes) {
    std::memset(to, 0, rows * bytes);
  } else {
    for (int64_t r = 0; r < rows; ++r) std::memset(to + r * to_row, 0, bytes);
  }
}

// Calls task(tensor, index) for every index below counts[tensor], in parallel; each moves about bytes[tensor]. Threads
// share the bytes equally, not the tasks, as tensors of one list may be very different: a thread gets the tasks that
// begin in its share of all bytes.
template <typename Task>
void for_each_task(const std::vector<int64_t>& counts, const std::vector<int64_t>& bytes, const Task& task) {
  std::vector<int64_t> starts;
  starts.reserve(counts.size() + 1);
  starts.push_back(0);
  for (size_t i = 0; i < counts.size(); ++i) starts.push_back(starts[i] + counts[i] * bytes[i]);
  torch::stable::parallel_for(0, starts.back(), kSerialBytes, [&](int64_t begin, int64_t end) {
    size_t tensor = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; tensor < counts.size() && starts[tensor] < end; ++tensor) {
      const auto first_at = [&](int64_t at) {  // the first task that begins there or later
        return std::clamp<int64_t>((at - starts[tensor] + bytes[tensor] - 1) / bytes[tensor], 0, counts[tensor]);
      };
      for (int64_t index = first_at(begin), last = first_at(end); index < last; ++index) task(tensor, index);
    }
    finish_streams();
  });
}

// How many bytes ahead to prefetch while a lane is moved, or 0 for none: where the lane after the next lies, so that
// memory has the time of a whole lane to answer. It is only a hint, and may point outside of the tensor.
int64_t fetched_ahead(const Lanes& view, bool whole, bool streams) {
  if (whole && !view.dims.empty()) return 2 * view.dims[0].from_stride;
  return streams ? kAheadBytes : 0;
}

// Moves rows first..last-1 of every lane. Tasks are cut at will, so none may write what another one reads.
void move_lanes(const std::vector<Lanes>& lanes, const Runs& runs, int64_t first, int64_t last) {
  const int64_t batch = static_cast<int64_t>(runs.size()), rows = last - first;
  int64_t all_bytes = 0;
  for (const Lanes& view : lanes) all_bytes += batch * view.count * rows * view.block;
  const int64_t task_bytes = std::max(kTaskBytes, all_bytes / (kTasksPerThread * torch::stable::get_num_threads()));

  std::vector<int64_t> rows_per_task, counts, bytes;
  rows_per_task.reserve(lanes.size());
  counts.reserve(lanes.size());
  bytes.reserve(lanes.size());
  for (const Lanes& view : lanes) {
    const int64_t chunk = std::clamp<int64_t>(task_bytes / view.block, 1, rows);
    rows_per_task.push_back(chunk);
    counts.push_back(batch * view.count * ((rows + chunk - 1) / chunk));
    bytes.push_back(chunk * view.block);
  }

  const bool streams = all_bytes > kStreamBytes;
  for_each_task(counts, bytes, [&](size_t i, int64_t index) {
    const Lanes& view = lanes[i];
    const int64_t chunks = (rows + rows_per_task[i] - 1) / rows_per_task[i];
    const int64_t lane = index / chunks;
    const int64_t begin = first + index % chunks * rows_per_task[i];
    const int64_t end = std::min(last, begin + rows_per_task[i]);
    const char* from = view.from + lane / view.count * view.from_batch;
    char* to = view.to + lane / view.count * view.to_batch;
    view.locate(lane % view.count, from, to);
    // The runs that reach into this task; a plan without long runs has as many as rows.
    const std::vector<Run>& all = runs[lane / view.count];
    auto next = std::upper_bound(all.begin(), all.end(), begin,
                                 [](int64_t row, const Run& run) { return row < run.to + run.count; });
    for (; next != all.end() && next->to < end; ++next) {
      const Run& run = *next;
      const int64_t start = std::max(run.to, begin);
      const int64_t count = std::min(run.to + run.count, end) - start;
      char* target = to + start * view.to_row;
      if (run.from < 0) {
        clear_rows(target, view.to_row, count, view.block);
      } else {
        const char* source = from + (run.from + start - run.to) * view.from_row;
        move_rows(target, view.to_row, source, view.from_row, count, view.block,
                  fetched_ahead(view, chunks == 1, streams), streams);
      }
    }
  });
}

std::vector<Tensor> gather(const std::vector<Tensor>& tensors, const std::vector<TokenDims>& dims, const Runs& runs,
                           int64_t rows) {
  std::vector<Tensor> results;
  std::vector<Lanes> lanes;
  results.reserve(tensors.size());
  lanes.reserve(tensors.size());
  std::vector<int64_t> shape;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto sizes = tensors[i].sizes();
    shape.assign(sizes.begin(), sizes.end());
    shape[dims[i].token] = rows;
    shape[dims[i].batch] = static_cast<int64_t>(runs.size());
    results.push_back(allocate(tensors[i], shape));
    if (results[i].numel() > 0) lanes.emplace_back(tensors[i], results[i], dims[i]);
  }
  move_lanes(lanes, runs, 0, rows);
  return results;
}

// --- ops -------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> plan_compaction(const Tensor& keep, int64_t length, bool pad_left) {
  check_keep(keep, length);
  const int64_t batch = keep.size(0);
  const int64_t tokens = keep.size(1);
  VTW_REQUIRE(tokens <= INT_MAX, "plan_compaction", "keep", "at most 2^31 - 1 tokens", text(tokens));
  const int64_t rows = length < 0 ? tokens : length;
  Tensor source = allocate(keep, {batch, rows}, ScalarType::Int);
  Tensor lengths = allocate(keep, {batch}, ScalarType::Int);
  auto* source_data = static_cast<int32_t*>(source.mutable_data_ptr());
  auto* lengths_data = static_cast<int32_t*>(lengths.mutable_data_ptr());
  const auto* keep_data = static_cast<const uint8_t*>(keep.const_data_ptr());
  const int64_t token_stride = keep.stride(1);
  for (int64_t b = 0; b < batch; ++b) {
    const uint8_t* kept = keep_data + b * keep.stride(0);
    int32_t* row = source_data + b * rows;
    int64_t count = 0;
    // Left padding fills the row from its end, so that cutting drops the first kept rows instead of the last.
    for (int64_t i = 0; i < tokens && count < rows; ++i) {
      const int64_t s = pad_left ? tokens - 1 - i : i;
      if (kept[s * token_stride]) row[pad_left ? rows - 1 - count : count] = static_cast<int32_t>(s), ++count;
    }
    std::fill_n(pad_left ? row : row + count, rows - count, -1);
    lengths_data[b] = static_cast<int32_t>(count);
  }
  return {source, lengths};
}

std::vector<Tensor> compact(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
                            const std::vector<int64_t>& batch_dims, const Tensor& source) {
  const auto dims = check_tensors(Op::kCompact, tensors, token_dims, batch_dims, source);
  const Runs runs = compact_runs(Source(source));
  check_runs(Op::kCompact, runs, tensors, dims);
  return gather(tensors, dims, runs, source.size(1));
}

std::vector<Tensor> expand(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
                           const std::vector<int64_t>& batch_dims, const Tensor& source, int64_t length) {
  const auto dims = check_tensors(Op::kExpand, tensors, token_dims, batch_dims, source);
  VTW_REQUIRE(length >= 0, "expand", "length", "a number of rows", text(length));
  const Runs compacted = compact_runs(Source(source));
  check_runs(Op::kExpand, compacted, length, [] { return "length"; });
  return gather(tensors, dims, expand_runs(compacted, length), length);
}

void compact_(const std::vector<Tensor>& tensors, const std::vector<int64_t>& token_dims,
              const std::vector<int64_t>& batch_dims, const Tensor& source) {
  const auto dims = check_tensors(Op::kCompactInPlace, tensors, token_dims, batch_dims, source);
  Runs runs = compact_runs(Source(source));
  check_runs(Op::kCompactInPlace, runs, tensors, dims);
  check_disjoint("compact_", "tensors", tensors, {{"source", source}});

  // What already stands in its place (all before the first dropped row) and padding are not runs to move.
  int64_t first = INT64_MAX, last = 0;
  bool apart = true;
  for (auto& sequence : runs) {
    const auto stays = [](const Run& run) { return run.from < 0 || run.from == run.to; };
    sequence.erase(std::remove_if(sequence.begin(), sequence.end(), stays), sequence.end());
    if (sequence.empty()) continue;
    first = std::min(first, sequence.front().to);
    last = std::max(last, sequence.back().to + sequence.back().count);
    const Run& run = sequence.front();
    apart = apart && sequence.size() == 1 && run.to + run.count <= run.from;
  }
  if (last == 0) return;

  std::vector<Lanes> lanes;
  lanes.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].numel() > 0) lanes.emplace_back(tensors[i], tensors[i], dims[i]);
  }
  // If each sequence has only one run to move, such as the text after an image, and its new place does not overlap the
  // old one, nothing is overwritten that is still to be read.
  if (apart) return move_lanes(lanes, runs, first, last);

  // Otherwise a lane is moved by one thread, from its first row to its last, because its rows overwrite one another.
  // Different lanes, and column tiles of one lane, share no bytes.
  std::vector<int64_t> tile_bytes, counts, bytes;
  const int64_t batch = static_cast<int64_t>(runs.size());
  int64_t all_bytes = 0;
  tile_bytes.reserve(lanes.size());
  counts.reserve(lanes.size());
  bytes.reserve(lanes.size());
  for (const Lanes& view : lanes) {
    const int64_t lane_bytes = (last - first) * view.block;
    const int64_t tiles = std::min(view.block / kStripBytes, (lane_bytes + kLaneBytes - 1) / kLaneBytes);
    tile_bytes.push_back(tiles > 1 ? (view.block / tiles + 63) / 64 * 64 : view.block);
    counts.push_back(batch * view.count * ((view.block + tile_bytes.back() - 1) / tile_bytes.back()));
    bytes.push_back((last - first) * tile_bytes.back());
    all_bytes += batch * view.count * lane_bytes;
  }

  const bool streams = all_bytes > kStreamBytes;
  for_each_task(counts, bytes, [&](size_t i, int64_t index) {
    const Lanes& view = lanes[i];
    const int64_t tiles = (view.block + tile_bytes[i] - 1) / tile_bytes[i];
    const int64_t lane = index / tiles;
    const int64_t begin = index % tiles * tile_bytes[i];
    const int64_t width = std::min(view.block - begin, tile_bytes[i]);
    const char* from = view.from + lane / view.count * view.from_batch;
    char* to = view.to + lane / view.count * view.to_batch;
    view.locate(lane % view.count, from, to);
    const int64_t ahead = fetched_ahead(view, tiles == 1, streams);
    for (const Run& run : runs[lane / view.count]) {
      move_rows(to + run.to * view.to_row + begin, view.to_row, from + run.from * view.from_row + begin, view.from_row,
                run.count, width, ahead, streams);
    }
  });
}

// A run of rows that lie in one page, before and after.
struct PagedRun {
  int64_t from_page, from_slot, to_page, to_slot, count;
};

// The moves of one sequence, cut where a page ends. `page_of` is its row of the block table.
template <typename PageOf>
std::vector<PagedRun> paged_runs(const std::vector<Run>& runs, int64_t page_size, const PageOf& page_of) {
  std::vector<PagedRun> pieces;
  for (Run run : runs) {
    while (run.count > 0) {
      const int64_t from_slot = run.from % page_size, to_slot = run.to % page_size;
      const int64_t count = std::min({run.count, page_size - from_slot, page_size - to_slot});
      pieces.push_back({page_of(run.from / page_size), from_slot, page_of(run.to / page_size), to_slot, count});
      run = {run.from + count, run.to + count, run.count - count};
    }
  }
  return pieces;
}

Tensor compact_paged_(const std::vector<Tensor>& caches, const Tensor& block_table, const Tensor& seq_lens,
                      const Tensor& keep, const std::string& layout) {
  const char* op = "compact_paged_";
  check_paged(caches, block_table, seq_lens, keep, layout);
  check_disjoint(op, "caches", caches, {{"block_table", block_table}, {"seq_lens", seq_lens}, {"keep", keep}});
  const int64_t slots = layout == "NHD" ? 1 : 2;
  const int64_t batch = keep.size(0), columns = block_table.size(1);
  const int64_t pages = caches.empty() ? 0 : caches[0].size(0);
  const int64_t page_size = caches.empty() ? 1 : caches[0].size(slots);
  const auto* lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  const Source table(block_table);  // the same shape of thing: int32 [B, ...] of any strides
  const auto* kept = static_cast<const uint8_t*>(keep.const_data_ptr());
  const int64_t keep_batch = keep.stride(0), keep_token = keep.stride(1);

  Tensor lengths = allocate(seq_lens, {batch});
  auto* new_lens = static_cast<int32_t*>(lengths.mutable_data_ptr());
  std::vector<std::vector<PagedRun>> moves(batch);
  std::vector<int32_t> users(pages, 0);
  int64_t rows = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t tokens = lens[b * seq_lens.stride(0)];
    VTW_REQUIRE(0 <= tokens && tokens <= keep.size(1), op, "seq_lens",
                text("lengths in [0, ", keep.size(1), "] of keep"), text(tokens));
    if (!caches.empty()) {
      const int64_t needed = (tokens + page_size - 1) / page_size;
      VTW_REQUIRE(needed <= columns, op, "block_table", text(needed, " pages for a sequence of ", tokens, " tokens"),
                  text(columns));
      for (int64_t column = 0; column < needed; ++column) {
        const int64_t page = table.at(b, column);
        VTW_REQUIRE(0 <= page && page < pages, op, "block_table", text("pages in [0, ", pages - 1, "] of caches"),
                    text(page));
        ++users[page];
      }
    }
    std::vector<Run> runs;
    int64_t count = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t start = t;
      while (t < tokens && kept[b * keep_batch + t * keep_token]) ++t;
      if (start < t && start != count) runs.push_back({start, count, t - start}), rows += t - start;
      count += t - start;
    }
    new_lens[b] = static_cast<int32_t>(count);
    if (!caches.empty()) moves[b] = paged_runs(runs, page_size, [&](int64_t column) { return table.at(b, column); });
  }
  // A prefix that several sequences share may stay in its pages, but must not move.
  for (const auto& sequence : moves) {
    for (const PagedRun& run : sequence) {
      VTW_REQUIRE(users[run.to_page] == 1, op, "block_table", "no shared page at or after the first dropped token",
                  text("page ", run.to_page, " in ", users[run.to_page], " places"));
    }
  }

  std::vector<Lanes> lanes;
  std::vector<int64_t> counts, bytes;
  lanes.reserve(caches.size());
  for (const Tensor& cache : caches) {
    lanes.emplace_back(cache, cache, TokenDims{slots, 0});
    counts.push_back(cache.numel() == 0 ? 0 : batch * lanes.back().count);
    bytes.push_back(std::max<int64_t>(1, rows * lanes.back().block / std::max<int64_t>(1, batch)));
  }
  // As in compact_, one thread walks the rows of a lane; here a lane ends with its sequence.
  for_each_task(counts, bytes, [&](size_t i, int64_t index) {
    const Lanes& view = lanes[i];
    const char* from = view.from;
    char* to = view.to;
    view.locate(index % view.count, from, to);
    for (const PagedRun& run : moves[index / view.count]) {
      move_rows(to + run.to_page * view.to_batch + run.to_slot * view.to_row, view.to_row,
                from + run.from_page * view.from_batch + run.from_slot * view.from_row, view.from_row, run.count,
                view.block, 0, false);
    }
  });
  return lengths;
}

void plan_packed_(const std::vector<Tensor>& plan, const Tensor& query_start, const Tensor& seq_lens,
                  const Tensor& visual, const Tensor& visual_start, const Tensor& block_table, int64_t block_size) {
  const char* op = "plan_packed_";
  check_packed(plan, query_start, seq_lens, visual, visual_start, block_table, block_size);
  check_disjoint(op, "plan", plan,
                 {{"query_start", query_start},
                  {"seq_lens", seq_lens},
                  {"visual", visual},
                  {"visual_start", visual_start},
                  {"block_table", block_table}});
  const int64_t batch = seq_lens.size(0), capacity = plan[0].size(0), columns = block_table.size(1);
  const auto* first = static_cast<const int32_t*>(query_start.const_data_ptr());
  const auto* lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  const auto* ranges = static_cast<const int32_t*>(visual.const_data_ptr());
  const auto* images = static_cast<const int32_t*>(visual_start.const_data_ptr());
  const Source table(block_table);

  const auto check_starts = [&](const char* name, const int32_t* x, int64_t limit, const char* of) {
    VTW_REQUIRE(x[0] == 0, op, name, "0 first", text(x[0]));
    for (int64_t b = 0; b < batch; ++b) {
      VTW_REQUIRE(x[b] <= x[b + 1], op, name, "ascending numbers", text(x[b + 1], " behind ", x[b]));
    }
    VTW_REQUIRE(x[batch] <= limit, op, name, text("at most the ", limit, " ", of), text(x[batch]));
  };
  check_starts("query_start", first, capacity, "rows of plan[0]");
  check_starts("visual_start", images, visual.size(0), "ranges of visual");
  std::vector<int64_t> texts(batch);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t rows = first[b + 1] - first[b], length = lens[b];
    VTW_REQUIRE(length >= rows, op, "seq_lens", text("at least the ", rows, " rows of sequence ", b), text(length));
    int64_t end = 0;
    texts[b] = length;
    for (int64_t i = images[b]; i < images[b + 1]; ++i) {
      const int64_t start = ranges[2 * i], stop = ranges[2 * i + 1];
      VTW_REQUIRE(end <= start && start <= stop, op, "visual", "ascending ranges apart",
                  text("[", start, ", ", stop, "] behind ", end));
      texts[b] -= std::max<int64_t>(0, std::min(stop, length) - start);
      end = stop;
    }
    const int64_t needed = (texts[b] + block_size - 1) / block_size;
    VTW_REQUIRE(needed <= columns, op, "block_table",
                text(needed, " blocks for the ", texts[b], " text tokens of sequence ", b), text(columns));
  }

  auto* source = static_cast<int32_t*>(plan[0].mutable_data_ptr());
  auto* text_start = static_cast<int32_t*>(plan[1].mutable_data_ptr());
  auto* text_lens = static_cast<int32_t*>(plan[2].mutable_data_ptr());
  auto* slots = static_cast<int64_t*>(plan[3].mutable_data_ptr());
  int64_t written = 0;
  text_start[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t begin = lens[b] - (first[b + 1] - first[b]), end = lens[b];  // the tokens that are rows now
    int64_t token = begin, t = begin;                                          // and how many before it are text
    const auto write_until = [&](int64_t stop) {
      for (; token < std::min(stop, end); ++token, ++t, ++written) {
        const int64_t block = table.at(b, t / block_size);
        source[written] = static_cast<int32_t>(first[b] + token - begin);
        slots[written] = block < 0 ? -1 : block * block_size + t % block_size;
      }
    };
    for (int64_t i = images[b]; i < images[b + 1]; ++i) {
      const int64_t start = ranges[2 * i], stop = ranges[2 * i + 1];
      t -= std::max<int64_t>(0, std::min(stop, begin) - start);
      write_until(start);
      token = std::max(token, stop);
    }
    write_until(end);
    text_start[b + 1] = static_cast<int32_t>(written);
    text_lens[b] = static_cast<int32_t>(texts[b]);
  }
  std::fill(source + written, source + capacity, -1);
  std::fill(slots + written, slots + capacity, -1);
}

}  // namespace
}  // namespace vtw

STABLE_TORCH_LIBRARY_IMPL(vtw_kernels, CPU, m) {
  if (!vtw::backend_enabled("cpu")) return;
  m.impl("plan_compaction", TORCH_BOX(&vtw::plan_compaction));
  m.impl("compact", TORCH_BOX(&vtw::compact));
  m.impl("compact_", TORCH_BOX(&vtw::compact_));
  m.impl("expand", TORCH_BOX(&vtw::expand));
  m.impl("compact_paged_", TORCH_BOX(&vtw::compact_paged_));
  m.impl("plan_packed_", TORCH_BOX(&vtw::plan_packed_));
}
