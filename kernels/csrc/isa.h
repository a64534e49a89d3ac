// Which instruction sets this build and this machine have, by name. Baseline instructions only.
#pragma once

#include <string>
#include <vector>

#include "attend.h"

namespace hybridgen {

// Names of the paths that were built and that this CPU runs, slowest first.
std::vector<std::string> supported_isas();

// Throws std::invalid_argument, naming what there is, when `name` is unknown, was not built or cannot run here.
const Kernels& find_kernels(const std::string& name);

}  // namespace hybridgen
