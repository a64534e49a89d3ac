// x @ weight.T in bfloat16 for few rows of x: the weight streams through once, row by row as it lies, and that is the
// time it takes. Every output is one chain of sums, whatever else is computed beside it.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

constexpr int kRows = 6;  // rows of x at once
constexpr int kChains = 2;  // sums of an output, over every other 32 inputs

inline uint16_t round_to_bfloat16(float x) {
  const __m128i rounded = (__m128i)_mm_cvtneps_pbh(_mm_set_ss(x));
  return static_cast<uint16_t>(_mm_extract_epi16(rounded, 0));
}

// One output of R rows. The weight's row is read from its begin to its end and the next one follows it in memory:
// several rows side by side would be several short streams, which the prefetchers do not catch up with.
template <int R>
void output_of_rows(const LinearTask& task, int64_t row, int64_t output) {
  const auto* x = static_cast<const uint16_t*>(task.x) + row * task.x_stride;
  const auto* weight = static_cast<const uint16_t*>(task.weight) + output * task.inputs;
  __m512 acc[R][kChains];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) acc[r][c] = _mm512_setzero_ps();
  }
  const int64_t whole = task.inputs / (32 * kChains) * (32 * kChains);
  for (int64_t i = 0; i < whole; i += 32 * kChains) {
#pragma GCC unroll 2
    for (int c = 0; c < kChains; ++c) {
      const auto w = (__m512bh)_mm512_loadu_si512(weight + i + 32 * c);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        acc[r][c] = _mm512_dpbf16_ps(acc[r][c], w, (__m512bh)_mm512_loadu_si512(x + r * task.x_stride + i + 32 * c));
      }
    }
  }
  for (int64_t i = whole; i < task.inputs; i += 32) {
    const int64_t left = task.inputs - i;
    const __mmask32 mask = left < 32 ? 0xffffffffu >> (32 - left) : 0xffffffffu;
    const auto w = (__m512bh)_mm512_maskz_loadu_epi16(mask, weight + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r][0] = _mm512_dpbf16_ps(acc[r][0], w, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * task.x_stride + i));
    }
  }
  float bias = 0.0f;
  if (task.bias != nullptr) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(task.bias)[output]) << 16;
    __builtin_memcpy(&bias, &bits, 4);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(acc[r][0], acc[r][1])) + bias;
    static_cast<uint16_t*>(task.out)[(row + r) * task.out_stride + output] = round_to_bfloat16(sum);
  }
}

template <int R>
void output_of(const LinearTask& task, int num_rows, int64_t row, int64_t output) {
  if constexpr (R > 1) {
    if (num_rows < R) return output_of<R - 1>(task, num_rows, row, output);
  }
  output_of_rows<R>(task, row, output);
}

void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t passes = (task.rows + kRows - 1) / kRows;
  const int64_t step = passes > 0 ? (task.rows + passes - 1) / passes : 1;
  for (int64_t output = begin; output < end; ++output) {
    for (int64_t row = 0; row < task.rows; row += step) {
      output_of<kRows>(task, static_cast<int>(task.rows - row < step ? task.rows - row : step), row, output);
    }
  }
}

}  // namespace

extern const LinearFn kLinearAvx512Bf16 = linear;

}  // namespace hybridgen
