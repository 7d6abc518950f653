// Thread-block clusters (sm_90 and later) and shared memory whose size the launch says, on a GPU and in the tests' host
// harness.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#endif

// Kernels that use clusters have an empty body where there are none; the host asks has_clusters() first.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define VTW_CLUSTERS 1
#else
#define VTW_CLUSTERS 0
#endif

#ifdef __CUDACC__
#define VTW_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#define VTW_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(simt::block().dynamic.data())
#endif

namespace vtw {

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t dynamic_shared,
                     cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  cudaError_t error = cudaSuccess;
  if (dynamic_shared > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_shared));
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;  // a device without clusters may refuse even one of a single block
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) throw std::runtime_error(std::string("vtw_kernels: launch: ") + cudaGetErrorString(error));
#else
  simt::launch(grid, block, [&] { kernel(arguments...); }, cluster, dynamic_shared);
#endif
}

}  // namespace vtw
