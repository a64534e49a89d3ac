// AVX-512 F, BW, DQ, VL: float32 arithmetic throughout; 16-bit elements are widened in registers.

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

struct Float32Ops : Avx512Base {
  using Element = float;
  using Query = float;
  static constexpr int kVectorPairs = 8;

  struct Acc {
    __m512 sums = _mm512_setzero_ps();  // (even, odd) x 8: a pair's two products are added at the end
  };
  using Pairs = __m512;
  using Broadcast = __m512;

  static Pairs load(const Element* p) { return _mm512_loadu_ps(p); }
  static Pairs load_tail(const Element* p, int num_pairs) {
    return _mm512_castpd_ps(_mm512_maskz_loadu_pd(static_cast<__mmask8>(0xffu >> (8 - num_pairs)), p));
  }
  static Pairs keep(Pairs pairs, bool even, bool odd) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>((even ? 0x5555 : 0) | (odd ? 0xaaaa : 0)), pairs);
  }
  static Broadcast broadcast(const Query* p) {
    double pair;
    __builtin_memcpy(&pair, p, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(pair));
  }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm512_fmadd_ps(pairs, pair, acc.sums);
  }
  static void store(const Acc& acc, float* out, int num) {
    const __m512 swapped = _mm512_permute_ps(acc.sums, 0b10110001);
    const __m512 sums = _mm512_maskz_compress_ps(0x5555, _mm512_add_ps(acc.sums, swapped));
    _mm256_mask_storeu_ps(out, static_cast<__mmask8>(0xffu >> (8 - num)), _mm512_castps512_ps256(sums));
  }
  static void pack(const Element* row, int head_dim, Query* q) { __builtin_memcpy(q, row, head_dim * 4); }
  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    softmax_avx512<6>(scores, begin, end, num, scale, soft_cap, maximum, sum,
                      [&](int i, __m512 weights) { _mm512_storeu_ps(scores + i, weights); });
  }
};

template <class T>
struct WidenOps : Avx512Base {
  using Element = T;
  using Query = float;
  static constexpr int kVectorPairs = 16;

  struct Acc {
    __m512 sums = _mm512_setzero_ps();
  };
  struct Pairs {
    __m512 even;
    __m512 odd;
  };
  struct Broadcast {
    __m512 even;
    __m512 odd;
  };

  static Pairs widen(__m512i raw) {
    if constexpr (__is_same(T, BFloat16)) {
      return {_mm512_castsi512_ps(_mm512_slli_epi32(raw, 16)),
              _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
    } else {
      return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw)),
              _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(raw, 16)))};
    }
  }
  static Pairs load(const Element* p) { return widen(_mm512_loadu_si512(p)); }
  static Pairs load_tail(const Element* p, int num_pairs) {
    return widen(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(0xffffu >> (16 - num_pairs)), p));
  }
  static Pairs keep(Pairs pairs, bool even, bool odd) {
    return {even ? pairs.even : _mm512_setzero_ps(), odd ? pairs.odd : _mm512_setzero_ps()};
  }
  static Broadcast broadcast(const Query* p) { return {_mm512_set1_ps(p[0]), _mm512_set1_ps(p[1])}; }
  static void multiply_add(Acc& acc, Pairs pairs, Broadcast pair) {
    acc.sums = _mm512_fmadd_ps(pairs.even, pair.even, acc.sums);
    acc.sums = _mm512_fmadd_ps(pairs.odd, pair.odd, acc.sums);
  }
  static void store(const Acc& acc, float* out, int num) {
    _mm512_mask_storeu_ps(out, static_cast<__mmask16>(0xffffu >> (16 - num)), acc.sums);
  }
  static void pack(const Element* row, int head_dim, Query* q) {
    for (int i = 0; i < head_dim; ++i) q[i] = to_float(row[i]);
  }
  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    Float32Ops::softmax(scores, begin, end, num, scale, soft_cap, maximum, sum);
  }
};

}  // namespace

extern const Kernels kAvx512Kernels = {
    {attend<Float32Ops>, attend<WidenOps<BFloat16>>, attend<WidenOps<Float16>>},
    {fold<Float32Ops>, fold<WidenOps<BFloat16>>, fold<WidenOps<Float16>>},
    {rms_norm<float>, rms_norm<BFloat16>, rms_norm<Float16>},
    {rotary<float>, rotary<BFloat16>, rotary<Float16>},
    {silu_and_mul<float>, silu_and_mul<BFloat16>, silu_and_mul<Float16>},
};

}  // namespace hybridgen
