// `Plan`, the type that Python sees: a call of one layer, and what it was checked for.
//
// The guards are the same as those of the plan in Python (grasp_kernels/layers/plan.py), which also
// makes the lists of them. Shapes: T tokens, K in, N out, R LoRA rank, Q basis size.
#include <Python.h>

#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <vector>

#include "lora.h"

namespace grasp {
namespace {

using at::Tensor;

// A dictionary, or null for the attributes of the layer; a key; the value it must have by identity,
// or None where there must be none.
struct Same {
  PyObject *owner, *key, *value;
};

// All objects are held as Python holds them: references of C++ to a tensor would hide cycles
// through it from the garbage collector, and keep it from being swapped.
struct Plan {
  PyObject_HEAD;
  std::array<PyObject*, 6> tensors;  // W, bias, A, B, b, V; None where there is none
  double scaling, dropout_p;
  bool residual, closed, transposed;
  std::vector<Same> same;
  std::vector<PyObject*> empty;                        // containers
  std::vector<std::pair<PyObject*, PyObject*>> kinds;  // modules and their classes
  PyObject* adapter;
  int64_t most_tokens;
  bool bf16;  // whether the CPU multiplies it fast
};

Tensor tensor_or_none(PyObject* given) {
  return given == Py_None ? Tensor() : THPVariable_Unpack(given);
}

Lora operands(const Plan& plan) {
  Lora op;
  Tensor* const places[] = {&op.weight, &op.bias,      &op.lora_A,
                            &op.lora_B, &op.lora_bias, &op.write_basis};
  for (size_t i = 0; i < plan.tensors.size(); ++i) *places[i] = tensor_or_none(plan.tensors[i]);
  op.scaling = plan.scaling, op.dropout_p = plan.dropout_p;
  op.residual = plan.residual, op.closed = plan.closed, op.transposed = plan.transposed;
  return op;
}

bool is_same(PyObject* owner, const Same& guard) {
  PyObject* value = PyDict_GetItemWithError(owner, guard.key);
  return value == guard.value || (value == nullptr && guard.value == Py_None);
}

bool objects_hold(const Plan& plan, PyObject* attributes) {
  for (const Same& guard : plan.same) {
    if (!is_same(guard.owner == nullptr ? attributes : guard.owner, guard)) return false;
  }
  for (PyObject* container : plan.empty) {
    if (PyObject_Size(container) != 0) return false;
  }
  for (const auto& [module, kind] : plan.kinds) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(module)) != kind) return false;
  }
  PyObject* active = PyDict_GetItemString(attributes, "_active_adapter");
  if (active != nullptr && PyList_Check(active) && PyList_GET_SIZE(active) == 1) {
    active = PyList_GET_ITEM(active, 0);
  }
  return active == plan.adapter ||
         (active != nullptr && PyObject_RichCompareBool(active, plan.adapter, Py_EQ) == 1);
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns, c10::Device device) {
  return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.device() == device;
}

bool is_vector(const Tensor& t, int64_t size, c10::Device device) {
  return !t.defined() || (t.dim() == 1 && t.size(0) == size && t.device() == device);
}

// The operands still fit each other and X; a write through `.data` may have given them others.
bool tensors_hold(const Plan& plan, const Lora& op, const Tensor& x) {
  if (x.layout() != at::kStrided || x.is_meta() || x.dim() < 1 || op.weight.dim() != 2 ||
      op.lora_A.dim() != 2) {
    return false;
  }
  const int64_t N = op.weight.size(op.transposed ? 1 : 0),
                K = op.weight.size(op.transposed ? 0 : 1);
  const int64_t R = op.lora_A.size(0);
  const c10::Device device = x.device();
  const c10::ScalarType dtype = op.weight.scalar_type();
  const bool casts = at::autocast::is_autocast_enabled(device.type());
  const auto compute = casts ? at::autocast::get_autocast_dtype(device.type()) : dtype;
  if (device.is_cpu() && compute == at::kBFloat16 && !plan.bf16) return false;
  return x.size(-1) == K && K > 0 && x.numel() / K <= plan.most_tokens &&
         (casts ? x.is_floating_point() && x.scalar_type() != at::kDouble
                : x.scalar_type() == dtype) &&
         op.weight.device() == device && is_matrix(op.lora_A, R, K, device) &&
         is_matrix(op.lora_B, N, R, device) && is_vector(op.bias, N, device) &&
         is_vector(op.lora_bias, N, device) &&
         (!op.write_basis.defined() ||
          is_matrix(op.write_basis, N, op.write_basis.size(1), device)) &&
         at::isFloatingType(dtype) && op.lora_A.is_floating_point() &&
         op.lora_B.is_floating_point() && !op.weight.requires_grad() &&
         !(op.bias.defined() && (op.bias.requires_grad() || op.bias.scalar_type() != dtype));
}

// Nothing transforms, counts or traces operations.
bool is_plain_call() {
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::stack_len() == 0 &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         !included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) &&
         !included.has(c10::DispatchKey::Tracer);
}

// Gate(gate, up, activation) of ops/gated.py.
bool gate_of(PyObject* given, Gate& found) {
  PyObject *gate, *up;
  const char* activation;
  if (!PyArg_ParseTuple(given, "O!O!s", THPVariableClass, &gate, THPVariableClass, &up,
                        &activation)) {
    return false;
  }
  found = {THPVariable_Unpack(gate), THPVariable_Unpack(up),
           activation[0] == 's' ? kSilu : kGeluTanh};
  return true;
}

PyObject* gated(PyObject*, PyObject* given) {
  HANDLE_TH_ERRORS
  Gate source;
  if (!gate_of(given, source)) return nullptr;
  Tensor x;
  {
    const pybind11::gil_scoped_release others_run;
    x = Gated::apply(source.gate, source.up, source.activation);
  }
  return THPVariable_Wrap(std::move(x));
  END_HANDLE_TH_ERRORS
}

PyObject* run(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "a plan runs on a layer, its input and None or a Gate.");
    return nullptr;
  }
  Plan& plan = *reinterpret_cast<Plan*>(self);
  // The garbage collector may have cleared a plan that a finalizer still calls.
  if (plan.tensors[0] == nullptr || !THPVariable_CheckExact(arguments[1])) Py_RETURN_NONE;
  const Tensor& x = THPVariable_Unpack(arguments[1]);
  PyObject* attributes = PyObject_GenericGetDict(arguments[0], nullptr);
  if (attributes == nullptr) return nullptr;
  const bool same = objects_hold(plan, attributes);
  Py_DECREF(attributes);
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (!same || !is_plain_call()) Py_RETURN_NONE;
  const Lora op = operands(plan);
  if (!tensors_hold(plan, op, x)) Py_RETURN_NONE;
  Gate source;
  if (arguments[2] != Py_None && !gate_of(arguments[2], source)) return nullptr;
  Tensor y;
  {
    const pybind11::gil_scoped_release others_run;
    y = lora_linear(op, x, source);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// Plan(tensors, options, transposed, guards), as PythonPlan
PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *tensors, *same, *empty, *kinds, *adapter;
  double scaling, dropout_p;
  int residual, closed, transposed, bf16;
  long long most_tokens;
  if (!PyArg_ParseTuple(arguments, "O!(ddpp)p(O!O!O!ULp)", &PyTuple_Type, &tensors, &scaling,
                        &dropout_p, &residual, &closed, &transposed, &PyList_Type, &same,
                        &PyList_Type, &empty, &PyList_Type, &kinds, &adapter, &most_tokens,
                        &bf16)) {
    return nullptr;
  }
  Plan* plan = reinterpret_cast<Plan*>(type->tp_alloc(type, 0));
  if (plan == nullptr) return nullptr;
  new (&plan->same) std::vector<Same>();
  new (&plan->empty) std::vector<PyObject*>();
  new (&plan->kinds) std::vector<std::pair<PyObject*, PyObject*>>();
  for (size_t i = 0; i < plan->tensors.size(); ++i) {
    plan->tensors[i] = Py_NewRef(PyTuple_GET_ITEM(tensors, i));
  }
  plan->scaling = scaling, plan->dropout_p = dropout_p;
  plan->residual = residual != 0, plan->closed = closed != 0, plan->transposed = transposed != 0;
  plan->adapter = Py_NewRef(adapter);
  plan->most_tokens = most_tokens, plan->bf16 = bf16 != 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(same); ++i) {
    PyObject* guard = PyList_GET_ITEM(same, i);
    PyObject* owner = PyTuple_GET_ITEM(guard, 0);
    plan->same.push_back({owner == Py_None ? nullptr : Py_NewRef(owner),
                          Py_NewRef(PyTuple_GET_ITEM(guard, 1)),
                          Py_NewRef(PyTuple_GET_ITEM(guard, 2))});
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(empty); ++i) {
    plan->empty.push_back(Py_NewRef(PyList_GET_ITEM(empty, i)));
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(kinds); ++i) {
    PyObject* guard = PyList_GET_ITEM(kinds, i);
    plan->kinds.emplace_back(Py_NewRef(PyTuple_GET_ITEM(guard, 0)),
                             Py_NewRef(PyTuple_GET_ITEM(guard, 1)));
  }
  return reinterpret_cast<PyObject*>(plan);
  END_HANDLE_TH_ERRORS
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  const Plan& plan = *reinterpret_cast<Plan*>(self);
  for (PyObject* tensor : plan.tensors) Py_VISIT(tensor);
  for (const Same& guard : plan.same) {
    Py_VISIT(guard.owner);
    Py_VISIT(guard.key);
    Py_VISIT(guard.value);
  }
  for (PyObject* container : plan.empty) Py_VISIT(container);
  for (const auto& [module, kind] : plan.kinds) {
    Py_VISIT(module);
    Py_VISIT(kind);
  }
  Py_VISIT(Py_TYPE(self));
  return 0;
}

int clear(PyObject* self) {
  Plan& plan = *reinterpret_cast<Plan*>(self);
  for (PyObject*& tensor : plan.tensors) Py_CLEAR(tensor);
  const std::vector<Same> same = std::move(plan.same);
  const std::vector<PyObject*> empty = std::move(plan.empty);
  const std::vector<std::pair<PyObject*, PyObject*>> kinds = std::move(plan.kinds);
  plan.same.clear(), plan.empty.clear(), plan.kinds.clear();
  for (const Same& guard : same) {
    Py_XDECREF(guard.owner);
    Py_DECREF(guard.key);
    Py_DECREF(guard.value);
  }
  for (PyObject* container : empty) Py_DECREF(container);
  for (const auto& [module, kind] : kinds) {
    Py_DECREF(module);
    Py_DECREF(kind);
  }
  return 0;
}

void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  Plan& plan = *reinterpret_cast<Plan*>(self);
  Py_DECREF(plan.adapter);
  plan.kinds.~vector();
  plan.same.~vector();
  plan.empty.~vector();
  type->tp_free(self);
  Py_DECREF(type);
}

// A copy of a layer gets None in place of its plan.
PyObject* reduce(PyObject*, PyObject*) { return Py_BuildValue("O()", Py_TYPE(Py_None)); }

PyMethodDef methods[] = {
    {"run", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(run)), METH_FASTCALL,
     "Return `Y[..., N]` of a layer, `X[..., K]`, and X as a product; None if a guard fails."},
    {"gated", gated, METH_O | METH_STATIC, "Return `act(G) ⊙ U [..., K]` of a `Gate`."},
    {"__reduce__", reduce, METH_NOARGS, "Copy as None."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(clear)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"grasp_kernels.Plan", sizeof(Plan), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                    slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "call", nullptr, -1, nullptr};

}  // namespace
}  // namespace grasp

#define GRASP_JOINED_(a, b) a##b
#define GRASP_JOINED(a, b) GRASP_JOINED_(a, b)

PyMODINIT_FUNC GRASP_JOINED(PyInit_, GRASP_MODULE)() {
  PyObject* module = PyModule_Create(&grasp::definition);
  if (module == nullptr) return nullptr;
  PyObject* type = PyType_FromSpec(&grasp::spec);
  if (type == nullptr || PyModule_AddObject(module, "Plan", type) < 0) {
    Py_XDECREF(type);
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
