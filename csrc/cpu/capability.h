// Which vector set the CPU kernels use. One build holds them for all three; the choice is made once, at run time.
#pragma once

#include <cstdlib>
#include <cstring>

namespace vtw {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it, as it does for torch's own kernels; it can't be raised above
// what the processor has.
inline CpuCapability cpu_capability() {
  static const CpuCapability chosen = [] {
    auto best = CpuCapability::kDefault;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = CpuCapability::kAvx2;
    if (best == CpuCapability::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = CpuCapability::kAvx512;
    }
#endif
    auto wanted = best;
    if (const char* name = std::getenv("ATEN_CPU_CAPABILITY")) {
      if (std::strcmp(name, "default") == 0) wanted = CpuCapability::kDefault;
      if (std::strcmp(name, "avx2") == 0) wanted = CpuCapability::kAvx2;
    }
    return wanted < best ? wanted : best;
  }();
  return chosen;
}

inline const char* cpu_capability_name() {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512: return "avx512";
    case CpuCapability::kAvx2: return "avx2";
    default: return "default";
  }
}

}  // namespace vtw
