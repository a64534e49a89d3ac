#pragma once

#include <nanobind/nanobind.h>

namespace hybridgen {

void bind_hybridgen(nanobind::module_& m);

}  // namespace hybridgen
