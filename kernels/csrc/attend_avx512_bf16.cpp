// AVX512_BF16: products of bfloat16 pairs, summed in float32. Softmax weights are rounded to bfloat16 for the
// product with V (their sum is not), which costs up to 2^-9 of a weight; every other dtype is as in avx512.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {

namespace {

#include "element.h"
#include "attend_inl.h"
#include "avx512_inl.h"

struct BFloat16Ops : Avx512Base {
  using Element = BFloat16;
  using Query = BFloat16;
  static constexpr int kVectorPairs = 16;

  struct Acc {
    __m512 sums = _mm512_setzero_ps();
  };
  using Pairs = __m512i;
  using Broadcast = __m512i;

  static Pairs load(const Element* p) { return _mm512_loadu_si512(p); }
  static Pairs load_tail(const Element* p, int num_pairs) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(0xffffu >> (16 - num_pairs)), p);
  }
  static Pairs keep(Pairs pairs, bool even, bool odd) {
    const uint32_t mask = (even ? 0x0000ffffu : 0u) | (odd ? 0xffff0000u : 0u);
    return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(mask)));
  }
  static Broadcast broadcast(const Query* p) {
    int pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm512_dpbf16_ps(acc.sums, (__m512bh)pairs, (__m512bh)pair);
  }
  static void store(const Acc& acc, float* out, int num) {
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(0xffffu >> (16 - num)), acc.sums);
  }
  static void pack(const Element* row, int head_dim, Query* q) { __builtin_memcpy(q, row, head_dim * 2); }
  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    // In place: a vector of weights ends before the next vector of scores begins.
    auto* weights_row = reinterpret_cast<char*>(scores);
    softmax_avx512<4>(scores, begin, end, num, scale, soft_cap, maximum, sum, [&](int i, __m512 weights) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weights);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_row + i * 2), rounded);
    });
  }
};

}  // namespace

extern const AttendFn kAttendAvx512Bf16 = attend<BFloat16Ops>;
extern const AttendFn kFoldAvx512Bf16 = fold<BFloat16Ops>;

}  // namespace hybridgen
