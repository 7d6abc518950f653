// The Python module _C: importing it registers torch.ops.vtw_kernels, as loading the binary by any other means does.

#include <Python.h>

// The only symbol of Python in this binary, and not needed before the module is imported: so a program without Python
// can load it too.
#pragma weak PyModule_Create2

namespace {

PyModuleDef module{PyModuleDef_HEAD_INIT, "_C",
                   "Compiled kernels of vtw_kernels; importing it registers torch.ops.vtw_kernels.", -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
