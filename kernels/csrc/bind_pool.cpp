// Pool in Python; wrapped by kernels/pool.py.
#include "bind_pool.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "isa.h"
#include "pool.h"

namespace nb = nanobind;

namespace hybridgen {
namespace {

using EventTuple = std::tuple<int32_t, int32_t, std::string, int32_t, uint64_t, int64_t, int64_t>;

std::vector<EventTuple> stop_trace(Pool& pool) {
  std::vector<EventTuple> tuples;
  for (const Event& event : pool.stop_trace()) {
    tuples.emplace_back(event.thread, event.layer, event.name, event.phase, event.job, event.begin_ns, event.end_ns);
  }
  return tuples;
}

}  // namespace

void bind_pool(nb::module_& m) {
  nb::class_<Stats>(m, "Stats")
      .def_ro("num_layers", &Stats::num_layers)
      .def_ro("bytes", &Stats::bytes)
      .def_ro("items", &Stats::items)
      .def_ro("busy_ns", &Stats::busy_ns)
      .def_ro("waiting_ns", &Stats::waiting_ns)
      .def_ro("blocked_ns", &Stats::blocked_ns);

  const nb::call_guard<nb::gil_scoped_release> unlocked;
  nb::class_<Pool>(m, "Pool")
      .def(
          "__init__",
          [](Pool* self, const std::vector<int>& cpus, const std::vector<int32_t>& groups, const std::string& isa) {
            if (cpus.size() != groups.size()) throw std::invalid_argument("one group for each CPU");
            std::vector<Pool::Place> places;
            for (size_t i = 0; i < cpus.size(); ++i) places.push_back({cpus[i], groups[i]});
            new (self) Pool(std::move(places), find_kernels(isa));
          },
          nb::arg("cpus"), nb::arg("groups"), nb::arg("isa"))
      .def_prop_ro("num_threads", &Pool::num_threads)
      .def_prop_ro("num_groups", &Pool::num_groups)
      .def("leave_caller_alone", &Pool::leave_caller_alone)
      .def("close", &Pool::close, unlocked)
      .def(
          "read",
          [](Pool& self, uintptr_t data, int64_t bytes) { return self.read(reinterpret_cast<void*>(data), bytes); },
          nb::arg("data"), nb::arg("bytes"), unlocked)
      .def("stats", &Pool::stats, unlocked)
      .def("reset_stats", &Pool::reset_stats, unlocked)
      .def("start_trace", &Pool::start_trace, nb::arg("max_events"), unlocked)
      .def("stop_trace", &stop_trace, unlocked);
}

}  // namespace hybridgen
