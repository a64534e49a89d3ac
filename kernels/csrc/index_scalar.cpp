// The portable path of the index: complete, and what every other path is tested against.

#include <cstddef>
#include <cstdint>

#include "index.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "index_inl.h"

struct ScalarOps {
  static constexpr int kRows = 1;

  template <int R, class Sink>
  static void tile(const std::byte* const* groups, const std::byte* const*, const IndexQuery& query, int row,
                   Sink&& sink) {
    static_assert(R == 1);
    FloatLanes out[2];
    for (int x = 0; x < 2; ++x) {
      const auto* codes = reinterpret_cast<const uint8_t*>(groups[x]);
      const std::byte* scales = groups[x] + query.chunks * kIndexDims * kIndexGroup;
      float sum[kIndexGroup] = {};
      for (int chunk = 0; chunk < query.chunks; ++chunk) {
        const int64_t at = int64_t{row} * query.chunks + chunk;
        int32_t dot[kIndexGroup];
        for (int32_t& d : dot) d = query.bias[at];
        for (int dim = 0; dim < kIndexDims; ++dim) {
          const int32_t q = query.codes[at * kIndexDims + dim];
          const uint8_t* quad = codes + (chunk * kIndexDims + dim) / 4 * 4 * kIndexGroup + dim % 4;
          for (int token = 0; token < kIndexGroup; ++token) dot[token] += quad[token * 4] * q;
        }
        Float16 scale[kIndexGroup];
        __builtin_memcpy(scale, scales + chunk * kIndexGroup * 2, sizeof(scale));
        for (int token = 0; token < kIndexGroup; ++token) {
          sum[token] += static_cast<float>(dot[token]) * (to_float(scale[token]) * query.factor[at]);
        }
      }
      out[x] = load_lanes<FloatLanes>(sum);
    }
    sink(0, out[0], out[1]);
  }
  static FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) { return a * b + c; }
  static ShortLanes pack(IntLanes first, IntLanes second) {
    ShortLanes packed;
    for (int i = 0; i < 32; ++i) {
      const int32_t token = kUnitTokens[i];
      const int32_t x = token < 16 ? first[token] : second[token - 16];
      packed[i] = static_cast<int16_t>(x < -32768 ? -32768 : x > 32767 ? 32767 : x);
    }
    return packed;
  }
  static int compress(int32_t* out, IntLanes ids, IntLanes keep) {
    int count = 0;
    for (int i = 0; i < 16; ++i) {
      if (keep[i] != 0) out[count++] = ids[i];
    }
    return count;
  }
};

}  // namespace

extern const IndexKernels kScalarIndex = {
    {quantize<float>, quantize<BFloat16>, quantize<Float16>},
    {sum_page<float>, sum_page<BFloat16>, sum_page<Float16>},
    {prepare<float>, prepare<BFloat16>, prepare<Float16>},
    estimate<ScalarOps>,
    scan<ScalarOps>,
    score<ScalarOps>,
    pick<ScalarOps>,
    verify<ScalarOps>,
};

}  // namespace hybridgen
