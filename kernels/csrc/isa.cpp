#include "isa.h"

#ifdef HYBRIDGEN_X86_64
#include <cpuid.h>
#endif

#include <stdexcept>

namespace hybridgen {

extern const Kernels kScalarKernels;
#ifdef HYBRIDGEN_X86_64
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const AttendFn kAttendAvx512Bf16;
extern const AttendFn kFoldAvx512Bf16;
extern const AttendFn kScoreAvx512Bf16;
extern const AttendFn kAttendAmx;
extern const AttendFn kScoreAmx;
extern const AttendFn kAttendAmxModel;
extern const AttendFn kScoreAmxModel;
extern const LinearFn kLinearAvx512Bf16;
bool enable_amx();
#endif

namespace {

struct Isa {
  std::string name;
  bool supported;
  Kernels kernels;
};

#ifdef HYBRIDGEN_X86_64
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22;
  constexpr unsigned kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & (kBf16 | kTile)) == (kBf16 | kTile) && enable_amx();
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> isas;
  isas.push_back({"scalar", true, kScalarKernels});
#ifdef HYBRIDGEN_X86_64
  // These ask the operating system too: registers that it does not save count as absent.
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  Kernels bf16 = kAvx512Kernels;
  bf16.attend[static_cast<int>(Dtype::bfloat16)] = kAttendAvx512Bf16;
  bf16.fold[static_cast<int>(Dtype::bfloat16)] = kFoldAvx512Bf16;
  bf16.score[static_cast<int>(Dtype::bfloat16)] = kScoreAvx512Bf16;
  bf16.linear = kLinearAvx512Bf16;
  Kernels amx = bf16;
  amx.attend[static_cast<int>(Dtype::bfloat16)] = kAttendAmx;
  amx.score[static_cast<int>(Dtype::bfloat16)] = kScoreAmx;
  Kernels amx_model = bf16;
  amx_model.attend[static_cast<int>(Dtype::bfloat16)] = kAttendAmxModel;
  amx_model.score[static_cast<int>(Dtype::bfloat16)] = kScoreAmxModel;
  isas.push_back({"amx_model", avx512_bf16, amx_model});
  isas.push_back({"avx2", avx2, kAvx2Kernels});
  isas.push_back({"avx512", avx512, kAvx512Kernels});
  isas.push_back({"avx512_bf16", avx512_bf16, bf16});
  isas.push_back({"amx", avx512_bf16 && has_amx_bf16(), amx});
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
