#pragma once

#include <nanobind/nanobind.h>

namespace hybridgen {

void bind_layer(nanobind::module_& m);

}  // namespace hybridgen
