#pragma once

#include <nanobind/nanobind.h>

namespace hybridgen {

void bind_memory(nanobind::module_& m);

}  // namespace hybridgen
