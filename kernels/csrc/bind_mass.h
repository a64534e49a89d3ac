#pragma once

#include <nanobind/nanobind.h>

namespace hybridgen {

void bind_mass(nanobind::module_& m);

}  // namespace hybridgen
