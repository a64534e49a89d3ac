// AVX-512 F, BW, DQ, VL: float32 arithmetic throughout; 16-bit elements are widened when they are repacked.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "attend_inl.h"
#include "avx512_inl.h"
#include "rows_inl.h"

template <class T>
struct FloatOps : Avx512Base {
  using Element = T;
  using Query = float;
  using Packed = float;
  static constexpr int kVectorPairs = 16;

  struct Acc {
    __m512 sums = _mm512_setzero_ps();
  };
  struct Pairs {
    __m512 even;
    __m512 odd;
  };
  using Broadcast = Pairs;

  // Eight dims make two vectors of four: the even and the odd ones where they come in pairs, else the halves.
  template <class Row>
  static void pack_keys(Row&& row, int head_dim, Packed* packed) {  // [head_dim / 8][4][2][4 tokens][4]
    if constexpr (__is_same(T, float)) {
      gather_words(row, head_dim, [&](int dim, int i, __m512i words) __attribute__((always_inline)) {
        _mm512_storeu_ps(packed + dim / 8 * 128 + i * 32 + dim % 8 * 4, _mm512_castsi512_ps(words));
      });
    } else {
      gather_words(row, head_dim / 2, [&](int pair, int i, __m512i words) __attribute__((always_inline)) {
        const Pairs dims = widen(words);
        _mm512_storeu_ps(packed + pair * 32 + i * 32, dims.even);
        _mm512_storeu_ps(packed + pair * 32 + i * 32 + 16, dims.odd);
      });
    }
  }
  template <int R>
  static void score_group(const Query* q, const Packed* packed, int head_dim, float* scores) {
    if constexpr (sizeof(T) == 2) head_dim = (head_dim + 7) / 8 * 8;  // even and odd ones of the last eight
    __m512 acc[R][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_setzero_ps();
    }
    for (int dim = 0; dim < head_dim; dim += 4, packed += (dim & 4) != 0 ? 16 : 112) {
      __m512 k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) k[i] = _mm512_loadu_ps(packed + i * 32);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 query = _mm512_broadcast_f32x4(_mm_load_ps(q + r * kQueryStride<Query> + dim));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = _mm512_fmadd_ps(k[i], query, acc[r][i]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      _mm512_storeu_ps(scores + r * (kScoreRowBytes / 4), sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    }
  }
  static Pairs widen(__m512i raw) {
    if constexpr (__is_same(T, BFloat16)) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    } else {
      return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw)),
              _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(raw, 16)))};
    }
  }
  static Pairs join_values(const Element* even, const Element* odd, int num) {
    return {load_row(even, first_lanes(num)), load_row(odd, first_lanes(num))};
  }
  static void pack_values(const Element* even, const Element* odd, int head_dim, Packed* packed) {  // [2][head_dim]
    for (int dim = 0; dim < head_dim; dim += 16) {
      const Pairs pairs = join_values(even + dim, odd + dim, min_int(16, head_dim - dim));
      _mm512_storeu_ps(packed + dim, pairs.even);
      _mm512_storeu_ps(packed + value_stride(head_dim) / 2 + dim, pairs.odd);
    }
  }
  static __m512 load_row(const Element* p, __mmask16 mask) {
    if constexpr (__is_same(T, float)) {
      return _mm512_maskz_loadu_ps(mask, p);
    } else {
      const __m256i raw = _mm256_maskz_loadu_epi16(mask, p);
      if constexpr (__is_same(T, Float16)) return _mm512_cvtph_ps(raw);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
  }
  static Pairs load_values(const Packed* run, int head_dim, int dim) {
    return {_mm512_loadu_ps(run + dim), _mm512_loadu_ps(run + value_stride(head_dim) / 2 + dim)};
  }
  static Broadcast broadcast(const Query* p) { return {_mm512_set1_ps(p[0]), _mm512_set1_ps(p[1])}; }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm512_fmadd_ps(pairs.even, pair.even, acc.sums);
    acc.sums = _mm512_fmadd_ps(pairs.odd, pair.odd, acc.sums);
  }
  static Acc load_acc(const float* out, int num) { return {_mm512_maskz_loadu_ps(first_lanes(num), out)}; }
  static void store(const Acc& acc, float* out, int num) { _mm512_mask_storeu_ps(out, first_lanes(num), acc.sums); }
  static void pack(const Element* row, int head_dim, Query* queries, int r) {
    Query* q = queries + static_cast<int64_t>(r) * kQueryStride<Query>;
    for (int i = 0; i < (head_dim + 7) / 8 * 8; ++i) {
      // As the eight dims of packed keys lie.
      const int place = sizeof(T) == 4 ? i : i / 8 * 8 + i % 2 * 4 + i % 8 / 2;
      q[place] = i < head_dim ? to_float(row[i]) : 0.0f;
    }
  }
  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    softmax_avx512<6>(scores, begin, end, num, scale, soft_cap, maximum, sum,
                      [&](int i, __m512 weights) { _mm512_storeu_ps(scores + i, weights); });
  }
};

}  // namespace

extern const Kernels kAvx512Kernels = {
    {attend<FloatOps<float>>, attend<FloatOps<BFloat16>>, attend<FloatOps<Float16>>},
    {fold<FloatOps<float>>, fold<FloatOps<BFloat16>>, fold<FloatOps<Float16>>},
    {score<FloatOps<float>>, score<FloatOps<BFloat16>>, score<FloatOps<Float16>>},
    {rms_norm<float>, rms_norm<BFloat16>, rms_norm<Float16>},
    {rotary<float>, rotary<BFloat16>, rotary<Float16>},
    {silu_and_mul<float>, silu_and_mul<BFloat16>, silu_and_mul<Float16>},
    {merge<float>, merge<BFloat16>, merge<Float16>},
};

}  // namespace hybridgen
