// x @ weight.T in bfloat16 for few rows of x: the weight streams through once, row by row as it lies, and that is the
// time it takes. Every output is one chain of sums, whatever else is computed beside it.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

constexpr int kOutputs = 4;  // weight rows at once
constexpr int kRows = 6;     // rows of x at once: 24 accumulators

// The sums of four vectors' 16 lanes.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0b01000100), _mm512_shuffle_ps(ab, cd, 0b11101110));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int R>
void tile(const LinearTask& task, int64_t row, int64_t output, int num_outputs) {
  const auto* x = static_cast<const uint16_t*>(task.x) + row * task.x_stride;
  const uint16_t* w[kOutputs];
#pragma GCC unroll 4
  for (int n = 0; n < kOutputs; ++n) {
    // Past the last output the last one again.
    const int64_t which = output + (n < num_outputs ? n : num_outputs - 1);
    w[n] = static_cast<const uint16_t*>(task.weight) + which * task.inputs;
  }
  __m512 acc[R][kOutputs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kOutputs; ++n) acc[r][n] = _mm512_setzero_ps();
  }
  auto step = [&](int64_t i, __mmask32 mask) __attribute__((always_inline)) {
    __m512bh weight[kOutputs];
#pragma GCC unroll 4
    for (int n = 0; n < kOutputs; ++n) weight[n] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w[n] + i);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto in = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + r * task.x_stride + i);
#pragma GCC unroll 4
      for (int n = 0; n < kOutputs; ++n) acc[r][n] = _mm512_dpbf16_ps(acc[r][n], weight[n], in);
    }
  };
  const int64_t whole = task.inputs / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) step(i, 0xffffffffu);
  if (whole < task.inputs) step(whole, 0xffffffffu >> (32 - (task.inputs - whole)));

  const auto mask = static_cast<__mmask8>(0xf >> (4 - num_outputs));
  __m128 bias = _mm_setzero_ps();
  if (task.bias != nullptr) {
    const __m128i raw = _mm_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(task.bias) + output);
    bias = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(raw), 16));
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const __m128 out = _mm_add_ps(sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]), bias);
    auto* place = static_cast<uint16_t*>(task.out) + (row + r) * task.out_stride + output;
    _mm_mask_storeu_epi16(place, mask, (__m128i)_mm_cvtneps_pbh(out));
  }
}

template <int R>
void tiles(const LinearTask& task, int num_rows, int64_t row, int64_t output, int num_outputs) {
  if constexpr (R > 1) {
    if (num_rows < R) return tiles<R - 1>(task, num_rows, row, output, num_outputs);
  }
  tile<R>(task, row, output, num_outputs);
}

void linear(const LinearTask& task, int64_t begin, int64_t end) {
  const int64_t passes = (task.rows + kRows - 1) / kRows;
  const int64_t step = passes > 0 ? (task.rows + passes - 1) / passes : 1;
  for (int64_t output = begin; output < end; output += kOutputs) {
    const int num_outputs = end - output < kOutputs ? static_cast<int>(end - output) : kOutputs;
    for (int64_t row = 0; row < task.rows; row += step) {
      const int num_rows = static_cast<int>(task.rows - row < step ? task.rows - row : step);
      tiles<kRows>(task, num_rows, row, output, num_outputs);
    }
  }
}

}  // namespace

extern const LinearFn kLinearAvx512Bf16 = linear;

}  // namespace hybridgen
