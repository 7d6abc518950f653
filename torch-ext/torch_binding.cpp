// The module that kernel-builder compiles, under the name that it gives it: importing it registers the ops.

#include <Python.h>

#define VTW_INIT_OF(name) PyInit_##name
#define VTW_INIT(name) VTW_INIT_OF(name)

namespace {

PyModuleDef module{PyModuleDef_HEAD_INIT, "vtw_kernels", "Importing it registers torch.ops.vtw_kernels.", -1, nullptr};

}  // namespace

PyMODINIT_FUNC VTW_INIT(TORCH_EXTENSION_NAME)() { return PyModule_Create(&module); }
