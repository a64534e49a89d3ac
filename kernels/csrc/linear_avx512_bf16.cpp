// x @ weight.T in bfloat16 for few rows of x: the weight streams through once, row by row as it lies, and that is the
// time it takes. Every output is one chain of sums, whatever else is computed beside it.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

constexpr int kRows = 6;     // rows of x at once
constexpr int kOutputs = 4;  // with them: 24 accumulators

inline void store_bfloat16(float x, void* out, int64_t place) {
  const __m128i rounded = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
  static_cast<uint16_t*>(out)[place] = static_cast<uint16_t>(_mm_extract_epi16(rounded, 0));
}

// The sums of four vectors' lanes; each is the same tree of additions, lanes eight apart first and neighbours last.
inline __m128 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const auto halves = [](__m512 x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
  const auto quarters = [](__m256 x) { return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)); };
  const __m128 a4 = quarters(halves(a));
  const __m128 b4 = quarters(halves(b));
  const __m128 c4 = quarters(halves(c));
  const __m128 d4 = quarters(halves(d));
  const __m128 ab = _mm_add_ps(_mm_movelh_ps(a4, b4), _mm_movehl_ps(b4, a4));
  const __m128 cd = _mm_add_ps(_mm_movelh_ps(c4, d4), _mm_movehl_ps(d4, c4));
  return _mm_add_ps(_mm_shuffle_ps(ab, cd, 0b10001000), _mm_shuffle_ps(ab, cd, 0b11011101));
}

inline float bias_of(const LinearTask& task, int64_t output) {
  if (task.bias == nullptr) return 0.0f;
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(task.bias)[output]) << 16;
  float bias;
  __builtin_memcpy(&bias, &bits, 4);
  return bias;
}

// O outputs of R rows. Each sum is one chain over the inputs, whatever the tile.
template <int R, int O>
void tile(const LinearTask& task, int64_t row, int64_t output) {
  const auto* x = static_cast<const uint16_t*>(task.x) + row * task.x_stride;
  const auto* weight = static_cast<const uint16_t*>(task.weight) + output * task.inputs;
  __m512 acc[R][O];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) acc[r][o] = _mm512_setzero_ps();
  }
  const auto multiply_add = [&](int64_t i, auto&& load) __attribute__((always_inline)) {
    __m512bh w[O];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) w[o] = load(weight + o * task.inputs + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh xs = load(x + r * task.x_stride + i);
#pragma GCC unroll 4
      for (int o = 0; o < O; ++o) acc[r][o] = _mm512_dpbf16_ps(acc[r][o], w[o], xs);
    }
  };
  const int64_t whole = task.inputs / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) {
    multiply_add(i, [](const uint16_t* p) __attribute__((always_inline)) { return (__m512bh)_mm512_loadu_si512(p); });
  }
  if (whole < task.inputs) {
    const __mmask32 mask = 0xffffffffu >> (32 - (task.inputs - whole));
    multiply_add(whole, [mask](const uint16_t* p) __attribute__((always_inline)) {
      return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m512 none = _mm512_setzero_ps();
    alignas(16) float sums[4];
    _mm_store_ps(sums, sums_of_four(acc[r][0], O > 1 ? acc[r][O > 1 ? 1 : 0] : none, O > 2 ? acc[r][O > 2 ? 2 : 0] : none,
                                    O > 3 ? acc[r][O > 3 ? 3 : 0] : none));
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) {
      store_bfloat16(sums[o] + bias_of(task, output + o), task.out, (row + r) * task.out_stride + output + o);
    }
  }
}

template <int O, int R = kRows>
void rows_of(const LinearTask& task, int num_rows, int64_t row, int64_t output) {
  if constexpr (R > 1) {
    if (num_rows < R) return rows_of<O, R - 1>(task, num_rows, row, output);
  }
  tile<R, O>(task, row, output);
}

// One row takes the weight's rows one after another: several side by side would be several short streams, which the
// prefetchers do not catch up with. More rows take as long as their products, and share what is loaded.
void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t passes = (task.rows + kRows - 1) / kRows;
  const int64_t step = passes > 0 ? (task.rows + passes - 1) / passes : 1;
  const int64_t tiled = task.rows > 2 ? begin + (end - begin) / kOutputs * kOutputs : begin;
  for (int64_t output = begin; output < end; output += output < tiled ? kOutputs : 1) {
    for (int64_t row = 0; row < task.rows; row += step) {
      const int rows = static_cast<int>(task.rows - row < step ? task.rows - row : step);
      if (output < tiled) {
        rows_of<kOutputs>(task, rows, row, output);
      } else {
        rows_of<1>(task, rows, row, output);
      }
    }
  }
}

}  // namespace

extern const LinearFn kLinearAvx512Bf16 = linear;

}  // namespace hybridgen
