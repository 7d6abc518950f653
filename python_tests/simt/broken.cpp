// Kernels that are wrong on purpose, each in a way that the harness must see: ./broken NAME exits with 0 if every run
// gave the right result, with 1 if some did not, and dies by a sanitizer or by the harness itself.

#include <array>
#include <map>
#include <string>

#include "simt.h"

constexpr int kRows = 64, kColumns = 8;

// In place, a column per block and a row per thread.
enum class Barrier { kThere, kMissing, kDivergent };

template <Barrier barrier>
__global__ void column_per_block(int* x, const int* source) {
  const int column = blockIdx.x, row = threadIdx.x;
  if (barrier == Barrier::kDivergent && row == 7) return;
  const int value = x[source[row] * kColumns + column];
  if (barrier != Barrier::kMissing) __syncthreads();
  x[row * kColumns + column] = value;
}

// The same with a row per block: right only while blocks run in ascending order.
__global__ void row_per_block(int* x, const int* source) {
  const int column = threadIdx.x, row = blockIdx.x;
  x[row * kColumns + column] = x[source[row] * kColumns + column];
}

// Reads one vector beyond the last row.
__global__ void off_by_one(int* x, const int* source) {
  const int column = blockIdx.x, row = threadIdx.x;
  const int value = x[(source[row] + 1) * kColumns + column];
  __syncthreads();
  x[row * kColumns + column] = value;
}

int main(int, char** arguments) {
  const std::map<std::string, std::pair<void (*)(int*, const int*), std::array<int, 2>>> kernels{
      {"right", {column_per_block<Barrier::kThere>, {kColumns, kRows}}},
      {"missing_barrier", {column_per_block<Barrier::kMissing>, {kColumns, kRows}}},
      {"divergent_barrier", {column_per_block<Barrier::kDivergent>, {kColumns, kRows}}},
      {"row_per_block", {row_per_block, {kRows, kColumns}}},
      {"off_by_one", {off_by_one, {kColumns, kRows}}},
  };
  const auto& [kernel, shape] = kernels.at(arguments[1]);
  for (int run = 0; run < 10; ++run) {
    std::vector<int> x(2 * kRows * kColumns), source(kRows);
    std::iota(x.begin(), x.end(), 0);
    for (int row = 0; row < kRows; ++row) source[row] = 2 * row + 1;
    simt::launch(shape[0], shape[1], [&, kernel = kernel] { kernel(x.data(), source.data()); });
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        if (x[row * kColumns + column] != source[row] * kColumns + column) return 1;
      }
    }
  }
}
