// The Python module _C: importing it registers torch.ops.vtw_kernels, as loading the binary by any other means does.

#include <Python.h>

#include "cpu/capability.h"
#ifdef VTW_WITH_CUDA
#include "cuda/build_info.h"
#endif

// Not needed before the module is imported: so a program without Python can load the same binary.
#pragma weak PyModule_Create2
#pragma weak Py_BuildValue
#pragma weak PyList_New
#pragma weak PyList_Append
#pragma weak Py_DecRef

namespace {

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* archs = PyList_New(0);
  const char* cuda = nullptr;
#ifdef VTW_WITH_CUDA
  const std::string version = vtw::cuda_version();
  cuda = version.c_str();
  for (const std::string& arch : vtw::cuda_archs()) {
    PyObject* text = Py_BuildValue("s", arch.c_str());
    PyList_Append(archs, text);
    Py_DecRef(text);
  }
#endif
  return Py_BuildValue("{s:s,s:s,s:s,s:z,s:N,s:s}", "torch", VTW_BUILT_WITH_TORCH, "compiler", __VERSION__,
                       "cpu_capability", vtw::cpu_capability_name(), "cuda", cuda, "cuda_archs", archs, "why_no_cuda",
                       VTW_WHY_NO_CUDA);
}

PyMethodDef methods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What this build holds: torch and compiler versions, the CPU vector set chosen at run time, CUDA and its archs or "
     "why it has none."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_C",
                   "Compiled kernels of vtw_kernels; importing it registers torch.ops.vtw_kernels.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
