// The Python module _build_info, apart from _C, which has to load where there is no Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/capability.h"
#ifdef VTW_WITH_CUDA
#include "python/nvcc.h"
#endif

PYBIND11_MODULE(_build_info, module) {
  module.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = VTW_BUILT_WITH_TORCH;
        info["compiler"] = __VERSION__;
        info["cpu_capability"] = vtw::cpu_capability_name();
#ifdef VTW_WITH_CUDA
        info["cuda"] = vtw::cuda_version();
        info["cuda_archs"] = vtw::cuda_archs();
#else
        info["cuda"] = pybind11::none();
        info["cuda_archs"] = pybind11::list();
#endif
        info["why_no_cuda"] = VTW_WHY_NO_CUDA;
        return info;
      },
      "What this build holds: torch and compiler versions, the CPU vector set chosen at run time, CUDA and its archs "
      "or why it has none.");
}
