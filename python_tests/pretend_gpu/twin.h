// Twins<kernel...> is an object whose making tells the pretend runtime the host twins of kernels, which are the kernels
// themselves, compiled for the host under simt.h.
#pragma once

#include <dlfcn.h>

#include <utility>

#include "pretend.h"
#include "simt.h"

template <auto kernel>
struct Twin;

template <typename... P, void (*kernel)(P...)>
struct Twin<kernel> {
  Twin() {
    // g++ gives the twin the name that nvcc gives the kernel.
    Dl_info symbol{};
    if (!dladdr(reinterpret_cast<void*>(kernel), &symbol) || symbol.dli_saddr != reinterpret_cast<void*>(kernel)) {
      simt::fail("a twin without a name: kernels here may not be static");
    }
    const size_t sizes[] = {sizeof(P)...};
    pretend_twin(symbol.dli_sname, call, sizes, sizeof...(P));
  }
  static void call(void** arguments, const void* grid, const void* block, unsigned cluster, size_t dynamic) {
    run(arguments, grid, block, cluster, dynamic, std::index_sequence_for<P...>());
  }
  template <size_t... I>
  static void run(void** arguments, const void* grid, const void* block, unsigned cluster, size_t dynamic,
                  std::index_sequence<I...>) {
    const auto body = [&] { kernel(*static_cast<std::remove_cv_t<P>*>(arguments[I])...); };
    simt::launch(*static_cast<const dim3*>(grid), *static_cast<const dim3*>(block), body, cluster, dynamic);
  }
};

template <auto... kernels>
struct Twins : Twin<kernels>... {};
