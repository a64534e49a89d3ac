#include "isa.h"

#include <stdexcept>

namespace hybridgen {

extern const Kernels kScalarKernels;
#ifdef HYBRIDGEN_X86_64
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const AttendFn kAttendAvx512Bf16;
extern const AttendFn kFoldAvx512Bf16;
#endif

namespace {

struct Isa {
  std::string name;
  bool supported;
  Kernels kernels;
};

std::vector<Isa> detect() {
  std::vector<Isa> isas;
  isas.push_back({"scalar", true, kScalarKernels});
#ifdef HYBRIDGEN_X86_64
  // These ask the operating system too: registers that it does not save count as absent.
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  isas.push_back({"avx2", avx2, kAvx2Kernels});
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  isas.push_back({"avx512", avx512, kAvx512Kernels});
  Kernels bf16 = kAvx512Kernels;
  bf16.attend[static_cast<int>(Dtype::bfloat16)] = kAttendAvx512Bf16;
  bf16.fold[static_cast<int>(Dtype::bfloat16)] = kFoldAvx512Bf16;
  isas.push_back({"avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), bf16});
#endif
  return isas;
}

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = detect();
  return all;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.push_back(isa.name);
  }
  return names;
}

const Kernels& find_kernels(const std::string& name) {
  std::string built;
  for (const Isa& isa : isas()) {
    if (isa.name == name) {
      if (isa.supported) return isa.kernels;
      throw std::invalid_argument("this CPU cannot run the instruction set '" + name + "'");
    }
    built += (built.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'; this build has " + built);
}

}  // namespace hybridgen
