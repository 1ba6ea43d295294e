// The only file that knows torch.library: registers the CPU kernels for the schemas that Python defines.
#include <Python.h>

#include "cpu/isa.h"

namespace {

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(alterrec::isa_name(alterrec::isa())); }

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set in use: scalar, avx2, avx512 or amx."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The native CPU engine.", -1, methods, nullptr, nullptr, nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
