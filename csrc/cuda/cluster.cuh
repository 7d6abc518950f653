// Thread-block clusters (sm_90 and later), and shared memory whose size is set at the launch; on a GPU and in the
// tests' host harness.
#pragma once

#include "launch.cuh"

#ifdef __CUDACC__
#include <cooperative_groups.h>

#include <mutex>
#include <set>
#include <utility>
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

#ifdef __CUDACC__
// Allows a kernel all the shared memory that a block may have on the current device. Set once for each kernel and
// device, and to the maximum: if each call set what it needs itself, that could be too little for a call that another
// thread is about to make.
inline void allow_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kernel), "cudaFuncGetAttributes");
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  most -= static_cast<int>(code.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "cudaFuncSetAttribute");
  allowed.insert({kernel, device});
}
#endif

template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t dynamic_shared,
                     cudaStream_t stream, const Arguments&... arguments) {
#ifdef __CUDACC__
  if (dynamic_shared > 0) allow_shared(reinterpret_cast<const void*>(kernel));
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
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
#else
  simt::launch(grid, block, [&] { kernel(arguments...); }, cluster, dynamic_shared);
#endif
}

}  // namespace vtw
