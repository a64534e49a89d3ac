#pragma once

#include <nanobind/nanobind.h>

namespace hybridgen {

void bind_pool(nanobind::module_& m);

}  // namespace hybridgen
