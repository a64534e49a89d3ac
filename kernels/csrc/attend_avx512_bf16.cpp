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
  using Packed = BFloat16;
  static constexpr int kVectorPairs = 16;

  struct Acc {
    __m512 sums = _mm512_setzero_ps();
  };
  using Pairs = __m512i;
  using Broadcast = __m512i;

  template <class Row>
  static void pack_keys(Row&& row, int head_dim, Packed* packed) {  // [head_dim / 8][4][4 tokens][8]
    gather_words(row, head_dim / 2, [&](int pair, int i, __m512i words) __attribute__((always_inline)) {
      _mm512_storeu_si512(packed + pair * 32 + i * 32, words);
    });
  }
  template <int R>
  static void score_group(const Query* q, const Packed* packed, int head_dim, float* scores) {
    __m512 acc[R][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_setzero_ps();
    }
    for (int dim = 0; dim < head_dim; dim += 8, packed += 128) {
      __m512i k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) k[i] = _mm512_loadu_si512(packed + i * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m128i dims = _mm_load_si128(reinterpret_cast<const __m128i*>(q + r * kQueryStride<Query> + dim));
        const __m512i query = _mm512_broadcast_i32x4(dims);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], (__m512bh)k[i], (__m512bh)query);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(scores + r * (kScoreRowBytes / 4), sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    }
  }
  // Lane 2i takes element i, lane 2i + 1 element 16 + i.
  static __m512i interleave(__m512i both) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
  }
  static Pairs join_values(const Element* even, const Element* odd, int num) {
    if (num == 16) {
      const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(even)));
      return interleave(
          _mm512_mask_broadcast_i64x4(low, 0xf0, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd))));
    }
    const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first_lanes(num), even));
    return interleave(_mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(first_lanes(num), odd), 1));
  }
  static void pack_values(const Element* even, const Element* odd, int head_dim, Packed* packed) {  // [head_dim][2]
    for (int dim = 0; dim < head_dim; dim += 16) {
      _mm512_storeu_si512(packed + dim * 2, join_values(even + dim, odd + dim, min_int(16, head_dim - dim)));
    }
  }
  static Pairs load_values(const Packed* run, int, int dim) { return _mm512_loadu_si512(run + dim * 2); }
  static Broadcast broadcast(const Query* p) {
    int pair;
    __builtin_memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm512_dpbf16_ps(acc.sums, (__m512bh)pairs, (__m512bh)pair);
  }
  static Acc load_acc(const float* out, int num) { return {_mm512_maskz_loadu_ps(first_lanes(num), out)}; }
  static void store(const Acc& acc, float* out, int num) { _mm512_mask_storeu_ps(out, first_lanes(num), acc.sums); }
  static void pack(const Element* row, int head_dim, Query* queries, int r) {
    Query* q = queries + static_cast<int64_t>(r) * kQueryStride<Query>;
    for (int i = 0; i < (head_dim + 7) / 8 * 8; ++i) q[i] = i < head_dim ? row[i] : BFloat16{0};
  }
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
extern const AttendFn kScoreAvx512Bf16 = score<BFloat16Ops>;

}  // namespace hybridgen
