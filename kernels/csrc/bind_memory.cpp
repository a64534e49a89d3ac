// Where memory lies, in Python; wrapped by kernels/memory.py and kernels/arena.py.
#include "bind_memory.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "memory.h"

namespace nb = nanobind;

namespace hybridgen {

void bind_memory(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  m.def("set_policy", &set_policy, nb::arg("address"), nb::arg("bytes"), nb::arg("mode"), nb::arg("nodes"), unlocked);
  m.def(
      "move_pages",
      [](uintptr_t addresses, int64_t count, uintptr_t nodes, uintptr_t status) {
        int64_t num_left = 0;
        const int error = move_pages(reinterpret_cast<const uintptr_t*>(addresses), count,
                                     reinterpret_cast<const int32_t*>(nodes), reinterpret_cast<int32_t*>(status), &num_left);
        return std::pair(error, num_left);
      },
      nb::arg("addresses"), nb::arg("count"), nb::arg("nodes"), nb::arg("status"), unlocked);
  m.def("advise", &advise, nb::arg("address"), nb::arg("bytes"), nb::arg("advice"), unlocked);
  m.def("lock_on_fault", &lock_on_fault, nb::arg("address"), nb::arg("bytes"), unlocked);
  m.def("unlock", &unlock, nb::arg("address"), nb::arg("bytes"), unlocked);
  m.def("chase", &chase, nb::arg("address"), nb::arg("bytes"), nb::arg("num_reads"), unlocked);
}

}  // namespace hybridgen
