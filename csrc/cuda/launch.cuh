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

// Throws what the launch itself reports; what goes wrong while the kernel runs surfaces at the next synchronisation.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, 0, stream>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string("vtw_kernels: launch: ") + cudaGetErrorString(error));
#else
  simt::launch(grid, block, [&] { kernel(arguments...); });
#endif
}

}  // namespace vtw
