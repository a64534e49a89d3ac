// The hybridgen policy in Python; wrapped by kernels/policies/hybridgen.py.
#include "bind_hybridgen.h"

#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <tuple>
#include <vector>

#include "hybridgen.h"

namespace nb = nanobind;

namespace hybridgen {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_hybridgen(nb::module_& m) {
  // Of all layers, since the last read: count, sum, minimum, scanned, attended of each.
  using StatsTuple = std::tuple<int64_t, double, double, int64_t, int64_t>;
  nb::class_<TopKRecord>(m, "TopKRecord")
      .def(
          "__init__",
          [](TopKRecord* self, int32_t num_layers) {
            new (self) TopKRecord{std::vector<TopKStats>(static_cast<size_t>(num_layers)), {}};
          },
          nb::arg("num_layers"))
      .def("read",
           [](TopKRecord& self) {
             std::vector<StatsTuple> layers;
             for (TopKStats& layer : self.layers) {
               layers.emplace_back(layer.count, layer.sum, layer.minimum, layer.scanned, layer.attended);
               layer = {};
             }
             return layers;
           })
      .def("read_busy_ns", [](TopKRecord& self) { return self.busy_ns.exchange(0); });

  nb::class_<HybridGenStep>(m, "HybridGenStep")
      .def(nb::init<const Step&, double, int32_t, TopKRecord&>(), nb::arg("step"), nb::arg("ratio"),
           nb::arg("min_tokens"), nb::arg("record"), nb::keep_alive<1, 2>(), nb::keep_alive<1, 5>())
      .def_prop_ro("rows", &HybridGenStep::rows)
      .def_prop_ro("is_settled", &HybridGenStep::is_settled)
      .def(
          "submit",
          [](HybridGenStep& self, int32_t layer, uintptr_t q, int64_t q_stride, uintptr_t out, int64_t out_stride,
             uintptr_t lse, float soft_cap, bool scored, bool others) {
            using Part = HybridGenStep::Part;
            return self.submit({layer, pointer<std::byte>(q), q_stride, pointer<std::byte>(out), out_stride, true,
                                pointer<float>(lse), 0, soft_cap},
                               scored && others ? Part::all : scored ? Part::scored : Part::others);
          },
          nb::arg("layer"), nb::arg("q"), nb::arg("q_stride"), nb::arg("out"), nb::arg("out_stride"), nb::arg("lse"),
          nb::arg("soft_cap"), nb::arg("scored"), nb::arg("others"), nb::keep_alive<0, 1>(),
          nb::call_guard<nb::gil_scoped_release>());

  nb::class_<HybridGenStep::Attend>(m, "HybridGenAttend")
      .def("wait", &HybridGenStep::Attend::wait, nb::call_guard<nb::gil_scoped_release>())
      .def("is_done", &HybridGenStep::Attend::is_done)
      .def("ended_ns", &HybridGenStep::Attend::ended_ns);
}

}  // namespace hybridgen
