// Products for few rows in Python; wrapped by kernels/linear.py and kernels/layer.py.
#include "bind_layer.h"

#include "isa.h"
#include "layer.h"

#include <nanobind/stl/string.h>

namespace nb = nanobind;

namespace hybridgen {
namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
std::byte* bytes(uintptr_t address) { return reinterpret_cast<std::byte*>(address); }

}  // namespace

void bind_layer(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;

  nb::class_<LinearWeights>(m, "LinearWeights")
      .def(
          "__init__",
          [](LinearWeights* self, uintptr_t weight, uintptr_t bias, int64_t inputs, int64_t outputs) {
            new (self) LinearWeights{pointer(weight), pointer(bias), inputs, outputs};
          },
          nb::arg("weight"), nb::arg("bias"), nb::arg("inputs"), nb::arg("outputs"));

  m.def(
      "linear",
      [](Pool& pool, const LinearWeights& weights, uintptr_t x, int64_t x_stride, uintptr_t out, int64_t out_stride,
         int64_t rows) { run_linear(pool, weights, pointer(x), x_stride, bytes(out), out_stride, rows); },
      nb::arg("pool"), nb::arg("weights"), nb::arg("x"), nb::arg("x_stride"), nb::arg("out"), nb::arg("out_stride"),
      nb::arg("rows"), unlocked);
  m.def("has_linear", [](const std::string& isa) { return find_kernels(isa).linear != nullptr; });

  nb::class_<Layer>(m, "Layer")
      .def(
          "__init__",
          [](Layer* self, uintptr_t attention_norm, const LinearWeights& qkv, uintptr_t q_norm, uintptr_t k_norm,
             const LinearWeights& out, uintptr_t mlp_norm, const LinearWeights& up, const LinearWeights& down,
             int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, float eps) {
            new (self) Layer({pointer(attention_norm), qkv, pointer(q_norm), pointer(k_norm), out, pointer(mlp_norm), up,
                              down, num_heads, num_kv_heads, head_dim, eps});
          },
          nb::arg("attention_norm"), nb::arg("qkv"), nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("out"),
          nb::arg("mlp_norm"), nb::arg("up"), nb::arg("down"), nb::arg("num_heads"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("eps"))
      .def(
          "enter",
          [](const Layer& self, Pool& pool, int64_t rows, uintptr_t x, uintptr_t residual, uintptr_t cos,
             uintptr_t sin, int64_t half, uintptr_t heads) {
            self.enter(pool, rows, bytes(x), bytes(residual), reinterpret_cast<const float*>(cos),
                       reinterpret_cast<const float*>(sin), half, bytes(heads));
          },
          nb::arg("pool"), nb::arg("rows"), nb::arg("x"), nb::arg("residual"), nb::arg("cos"), nb::arg("sin"),
          nb::arg("half"), nb::arg("heads"), unlocked)
      .def(
          "leave",
          [](const Layer& self, Pool& pool, int64_t rows, uintptr_t attended, uintptr_t residual, uintptr_t x) {
            self.leave(pool, rows, bytes(attended), bytes(residual), bytes(x));
          },
          nb::arg("pool"), nb::arg("rows"), nb::arg("attended"), nb::arg("residual"), nb::arg("x"), unlocked);
}

}  // namespace hybridgen
