// What Python calls for every layer and token, as functions of a module: a call costs 3 us where ctypes takes 8, with a
// CPU's caches full of weights (docs/log.md). native.py puts them in the place of those that ctypes finds under the same
// names, and goes on with those where Python's headers were not there when this was built.
#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "calls.h"

namespace {

// An argument as C++ has it: an integer, an address or None, a number. A failure shows in PyErr_Occurred.
template <class T> T argument(PyObject *from) {
  if constexpr (std::is_pointer_v<T>) return from == Py_None ? nullptr : reinterpret_cast<T>(PyLong_AsVoidPtr(from));
  else if constexpr (std::is_floating_point_v<T>) return static_cast<T>(PyFloat_AsDouble(from));
  else return static_cast<T>(PyLong_AsLongLong(from));
}

template <class R, class... A, size_t... I>
PyObject *call(R (*function)(A...), PyObject *const *args, std::index_sequence<I...>) {
  const std::tuple<A...> given{argument<A>(args[I])...};
  if (PyErr_Occurred()) return nullptr;
  if constexpr (std::is_void_v<R>) {
    Py_BEGIN_ALLOW_THREADS function(std::get<I>(given)...);
    Py_END_ALLOW_THREADS Py_RETURN_NONE;
  } else {
    R result;
    Py_BEGIN_ALLOW_THREADS result = function(std::get<I>(given)...);
    Py_END_ALLOW_THREADS return PyLong_FromLongLong(result);
  }
}

template <class R, class... A> PyObject *checked(R (*function)(A...), PyObject *const *args, Py_ssize_t n) {
  if (n == sizeof...(A)) return call(function, args, std::index_sequence_for<A...>());
  return PyErr_Format(PyExc_TypeError, "%zd arguments instead of %zu", n, sizeof...(A));
}

template <auto F> PyObject *fast(PyObject *, PyObject *const *args, Py_ssize_t n) { return checked(F, args, n); }

#define METHOD(NAME) {#NAME, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast<NAME>)), METH_FASTCALL, nullptr}

PyMethodDef methods[] = {
    METHOD(hf_flash_attend),        METHOD(hf_flash_attention_step), METHOD(hf_flash_layers),
    METHOD(hf_flash_step),          METHOD(hf_flash_stream_sum),     METHOD(hf_flash_tight_linear),
    METHOD(hf_flash_packed_linear), METHOD(hf_flash_ordered_matvec),
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_kernels() { return PyModule_Create(&module); }
#endif
