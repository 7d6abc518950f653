// In place, with several tiles of rows in the same columns and blocks that run at once: exits with 1 if a row is not
// where it belongs. The conformance tables run such blocks one after another, where none has to wait for another.

#include <random>

#include "cuda/compaction.cuh"

using namespace vtw::cuda;

constexpr int kHeads = 2, kRows = 700, kWidth = 256;  // bytes

int main() {
  setenv("SIMT_TOGETHER", "6", 1);
  std::mt19937 random(std::random_device{}());
  for (int run = 0; run < 12; ++run) {
    std::vector<char> before(kHeads * kRows * kWidth);
    for (char& x : before) x = static_cast<char>(random());
    std::vector<int32_t> source;
    const int same = run % 2 * 300;  // a tile and more of rows that stay where they are
    for (int row = 0; row < kRows; ++row) {
      if (row < same || random() % 4 != 0) source.push_back(row);
    }
    const int kept = static_cast<int>(source.size());
    source.resize(kRows, -1);
    const std::vector<int32_t> rows = source;

    std::vector<char> x = before;
    Lanes lanes{x.data(), x.data(), 0, 0, kWidth, kWidth, kRows, kHeads, {{kHeads, kRows * kWidth, kRows * kWidth}}};
    lanes.dims[1] = lanes.dims[2] = {1, 0, 0};
    lanes.log_vector = 4;
    lanes.vectors = kWidth >> lanes.log_vector;
    std::vector<unsigned> zeros;
    const auto clear = [&](int64_t count) {
      zeros.assign(count, 0);
      return zeros.data();
    };
    move({lanes}, Plan{source.data(), 1, kRows, kRows, 1}, DenseRows(), clear, nullptr);
    if (zeros.empty()) return 2;  // one tile was enough: this shows nothing
    // A plan that is none, with a hole of more than a tile: whatever it does, it ends.
    std::fill(source.begin() + 100, source.begin() + 300, -1);
    std::vector<char> y = before;
    lanes.from = lanes.to = y.data();
    move({lanes}, Plan{source.data(), 1, kRows, kRows, 1}, DenseRows(), clear, nullptr);

    for (int head = 0; head < kHeads; ++head) {
      for (int row = 0; row < kRows; ++row) {
        const int from = row < kept ? rows[row] : row;
        const size_t first = size_t(head) * kRows * kWidth;
        if (std::memcmp(&x[first + row * kWidth], &before[first + from * kWidth], kWidth) != 0) return 1;
      }
    }
  }
}
