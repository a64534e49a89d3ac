// AVX2, FMA, F16C: float32 arithmetic throughout; 16-bit elements are widened when they are repacked.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "attend_inl.h"
#include "rows_inl.h"

// 2^x, by a polynomial in x - round(x) and an exponent shift: relative error at most 3e-7 (minimax coefficients for
// |x| <= 1/2). Below 2^-126 the result is 0.
inline __m256 exp2_avx2(__m256 x) {
  // -inf - round(-inf) would be NaN. A NaN stays one: the second operand wins.
  x = _mm256_max_ps(_mm256_set1_ps(-127.0f), x);
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(0.00015345812f);
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.0013399931f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.009618489f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.055503286f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.24022646f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.6931472f));
  p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
  // The exponent field 0 stands for 2^-127 and would be read as zero or subnormal: the product is then 0.
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

inline float reduce_max(__m256 x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
}

inline float reduce_add(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

template <class T>
struct FloatOps {
  using Element = T;
  using Query = float;
  using Packed = float;
  static constexpr int kVectorPairs = 8;
  static constexpr bool kTiles = false;
  static constexpr int kScoreRows = 2;  // 8 accumulators, 4 vectors of keys and a broadcast fit the 16 registers
  static constexpr int kRows = 4;       // 8 accumulators, 2 x 2 vectors of pairs and a broadcast of two
  static constexpr int kVectors = 2;

  struct Acc {
    __m256 sums = _mm256_setzero_ps();
  };
  struct Pairs {
    __m256 even;
    __m256 odd;
  };
  using Broadcast = Pairs;

  // Eight dims make two vectors of four: the even and the odd ones where they come in pairs, else the halves.
  template <class Row>
  static void pack_keys(Row&& row, int head_dim, Packed* packed) {  // [head_dim / 8][2][4][2][2 tokens][4]
    const int whole = head_dim / 8 * 8;
    for (int dim = 0; dim < whole; dim += 8) {
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i, packed += 16) {
          const Element* a = row(half * 8 + i) + dim;
          const Element* b = row(half * 8 + 4 + i) + dim;
          if constexpr (__is_same(T, float)) {
            _mm256_storeu_ps(packed, _mm256_castsi256_ps(two_rows(a, b)));
            _mm256_storeu_ps(packed + 8, _mm256_castsi256_ps(two_rows(a + 4, b + 4)));
          } else if constexpr (__is_same(T, BFloat16)) {
            const __m256i words = two_rows(a, b);
            _mm256_storeu_ps(packed, _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)));
            _mm256_storeu_ps(packed + 8, _mm256_castsi256_ps(
                                             _mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))));
          } else {
            const __m256i words = two_rows(a, b);
            _mm256_storeu_ps(packed, half_to_float(_mm256_and_si256(words, _mm256_set1_epi32(0xffff))));
            _mm256_storeu_ps(packed + 8, half_to_float(_mm256_srli_epi32(words, 16)));
          }
        }
      }
    }
    if (whole == head_dim) return;
    for (int token = 0; token < 16; ++token) {
      for (int i = 0; i < 8; ++i) {
        const float value = whole + i < head_dim ? to_float(row(token)[whole + i]) : 0.0f;
        const int part = sizeof(T) == 4 ? i / 4 : i % 2;
        const int place = sizeof(T) == 4 ? i % 4 : i / 2;
        packed[token / 8 * 64 + token % 4 * 16 + part * 8 + token / 4 % 2 * 4 + place] = value;
      }
    }
  }
  static __m256i two_rows(const void* a, const void* b) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(a))),
                                   _mm_loadu_si128(static_cast<const __m128i*>(b)), 1);
  }
  template <int R>
  static void score_group(const Query* q, const Packed* packed, int head_dim, float* scores) {
    if constexpr (sizeof(T) == 2) head_dim = (head_dim + 7) / 8 * 8;  // even and odd ones of the last eight
    for (int half = 0; half < 2; ++half) {
      __m256 acc[R][4];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_setzero_ps();
      }
      const Packed* p = packed + half * 64;
      for (int dim = 0; dim < head_dim; dim += 4, p += (dim & 4) != 0 ? 8 : 120) {
        __m256 k[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) k[i] = _mm256_loadu_ps(p + i * 16);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m256 query = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(q + r * kQueryStride<Query> + dim));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_fmadd_ps(k[i], query, acc[r][i]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256 ab = _mm256_hadd_ps(acc[r][0], acc[r][1]);
        const __m256 cd = _mm256_hadd_ps(acc[r][2], acc[r][3]);
        _mm256_storeu_ps(scores + r * (kScoreRowBytes / 4) + half * 8, _mm256_hadd_ps(ab, cd));
      }
    }
  }
  static __m256 half_to_float(__m256i word) {  // 8 float16 in the low halves
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
    return _mm256_cvtph_ps(packed);
  }
  static __m256 load_row(const Element* p, int num) {
    if (num < 8) {
      alignas(32) float values[8] = {};
      for (int i = 0; i < num; ++i) values[i] = to_float(p[i]);
      return _mm256_load_ps(values);
    }
    if constexpr (__is_same(T, float)) {
      return _mm256_loadu_ps(p);
    } else {
      const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      if constexpr (__is_same(T, Float16)) return _mm256_cvtph_ps(raw);
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    }
  }
  static Pairs join_values(const Element* even, const Element* odd, int num) {
    return {load_row(even, num), load_row(odd, num)};
  }
  static void pack_values(const Element* even, const Element* odd, int head_dim, Packed* packed) {  // [2][head_dim]
    for (int dim = 0; dim < head_dim; dim += 8) {
      const Pairs pairs = join_values(even + dim, odd + dim, min_int(8, head_dim - dim));
      _mm256_storeu_ps(packed + dim, pairs.even);
      _mm256_storeu_ps(packed + value_stride(head_dim) / 2 + dim, pairs.odd);
    }
  }
  static Pairs load_values(const Packed* run, int head_dim, int dim) {
    return {_mm256_loadu_ps(run + dim), _mm256_loadu_ps(run + value_stride(head_dim) / 2 + dim)};
  }
  static Broadcast broadcast(const Query* p) { return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p + 1)}; }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm256_fmadd_ps(pairs.even, pair.even, acc.sums);
    acc.sums = _mm256_fmadd_ps(pairs.odd, pair.odd, acc.sums);
  }
  static __m256i first_lanes(int num) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(num), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Acc load_acc(const float* out, int num) {
    return {num == 8 ? _mm256_loadu_ps(out) : _mm256_maskload_ps(out, first_lanes(num))};
  }
  static void store(const Acc& acc, float* out, int num) {
    if (num == 8) return _mm256_storeu_ps(out, acc.sums);
    _mm256_maskstore_ps(out, first_lanes(num), acc.sums);
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
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
    constexpr float kLog2E = 1.44269504088896f;
    float factor = scale * kLog2E;
    if (soft_cap > 0.0f) {
      for (int i = begin; i < end; ++i) scores[i] = soft_cap * __builtin_tanhf(scores[i] * scale / soft_cap);
      factor = kLog2E;
    }
    const __m256 nothing = _mm256_set1_ps(-__builtin_inff());
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    auto visible = [&](int i) __attribute__((always_inline)) {
      const __m256i index = _mm256_add_epi32(lanes, _mm256_set1_epi32(i));
      return _mm256_castsi256_ps(_mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), index),
                                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(end), index)));
    };
    __m256 largest = nothing;
    for (int i = 0; i < num; i += 8) {
      // max(a, b) is b where a is NaN: a NaN that is seen must stay.
      const __m256 x = _mm256_blendv_ps(nothing, _mm256_loadu_ps(scores + i), visible(i));
      largest = _mm256_max_ps(largest, x);
    }
    maximum = reduce_max(largest) * factor;
    const __m256 factors = _mm256_set1_ps(factor);
    const __m256 shift = _mm256_set1_ps(maximum);
    __m256 sums = _mm256_setzero_ps();
    for (int i = 0; i < num; i += 8) {
      const __m256 x = _mm256_fmsub_ps(_mm256_loadu_ps(scores + i), factors, shift);
      const __m256 weights = _mm256_and_ps(exp2_avx2(x), visible(i));
      sums = _mm256_add_ps(sums, weights);
      _mm256_storeu_ps(scores + i, weights);
    }
    sum = reduce_add(sums);
  }
};

}  // namespace

extern const Kernels kAvx2Kernels = {
    {attend<FloatOps<float>>, attend<FloatOps<BFloat16>>, attend<FloatOps<Float16>>},
    {fold<FloatOps<float>>, fold<FloatOps<BFloat16>>, fold<FloatOps<Float16>>},
    {score<FloatOps<float>>, score<FloatOps<BFloat16>>, score<FloatOps<Float16>>},
    {rms_norm<float>, rms_norm<BFloat16>, rms_norm<Float16>},
    {rotary<float>, rotary<BFloat16>, rotary<Float16>},
    {silu_and_mul<float>, silu_and_mul<BFloat16>, silu_and_mul<Float16>},
    {merge<float>, merge<BFloat16>, merge<Float16>},
};

}  // namespace hybridgen
