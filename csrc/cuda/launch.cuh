// One way to launch a kernel, on a GPU and in the tests' host harness (python_tests/simt).
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#else
#include "simt.h"
#endif

namespace vtw {

// Throws an error that the CUDA runtime reports, and clears it there: otherwise the next launch, whoever makes it,
// would report it again.
#ifdef __CUDACC__
inline void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string("vtw_kernels: ") + call + ": " + cudaGetErrorString(error));
}
#else
inline void check(int, const char*) {}
#endif

// Throws errors of the launch itself; errors while the kernel runs surface at the next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, 0, stream>>>(arguments...);
  check(cudaGetLastError(), "launch");
#else
  simt::launch(grid, block, [&] { kernel(arguments...); });
#endif
}

}  // namespace vtw
