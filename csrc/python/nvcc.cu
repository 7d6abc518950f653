#include "python/nvcc.h"

namespace vtw {

namespace {
std::string with_point(int number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); }
}  // namespace

std::string cuda_version() { return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

std::vector<std::string> cuda_archs() {
  std::vector<std::string> names;
  for (int arch : {__CUDA_ARCH_LIST__}) names.push_back(with_point(arch / 10));
  return names;
}

}  // namespace vtw
