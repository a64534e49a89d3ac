// AVX-512 with VNNI: products of four int8 pairs a lane, summed exactly.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "index.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "index_inl.h"

struct Avx512Ops {
  static constexpr int kRows = 5;  // 10 integer and 10 float accumulators, and what a step needs of the 32 registers

  template <int R, class Sink>
  __attribute__((always_inline)) static void tile(const std::byte* const* groups, const std::byte* const* next,
                                                  const IndexQuery& query, int row, Sink&& sink) {
    constexpr int kChunkBytes = kIndexDims * kIndexGroup;
    const int chunks = query.chunks;
    const int64_t row_bytes = int64_t{chunks} * kIndexDims;
    __m512 sums[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const std::byte* a = groups[0] + int64_t{chunk} * kChunkBytes;
      const std::byte* b = groups[1] + int64_t{chunk} * kChunkBytes;
      const std::byte* next_a = next[0] + int64_t{chunk} * kChunkBytes;
      const std::byte* next_b = next[1] + int64_t{chunk} * kChunkBytes;
      const int8_t* q = query.codes + row * row_bytes + int64_t{chunk} * kIndexDims;
      __m512i dots[R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        dots[r][0] = dots[r][1] = _mm512_set1_epi32(query.bias[int64_t{row + r} * chunks + chunk]);
      }
#pragma GCC unroll 8
      for (int quad = 0; quad < kIndexDims / 4; ++quad) {
        const __m512i codes_a = _mm512_loadu_si512(a + quad * 64);
        const __m512i codes_b = _mm512_loadu_si512(b + quad * 64);
        prefetch(next_a + quad * 64);
        prefetch(next_b + quad * 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          int four;
          __builtin_memcpy(&four, q + r * row_bytes + quad * 4, 4);
          const __m512i dims = _mm512_set1_epi32(four);
          dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], codes_a, dims);
          dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], codes_b, dims);
        }
      }
      const int64_t scales = int64_t{chunks} * kChunkBytes + chunk * kIndexGroup * 2;
      const __m512 scale_a = load_scales(groups[0] + scales);
      const __m512 scale_b = load_scales(groups[1] + scales);
      prefetch(next[0] + scales);
      prefetch(next[1] + scales);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512 factor = _mm512_set1_ps(query.factor[int64_t{row + r} * chunks + chunk]);
        sums[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][0]), _mm512_mul_ps(scale_a, factor), sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][1]), _mm512_mul_ps(scale_b, factor), sums[r][1]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sink(r, (FloatLanes)sums[r][0], (FloatLanes)sums[r][1]);
  }
  static __m512 load_scales(const std::byte* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // To L2: prefetches to L1 share its few miss buffers with the loads. Inlined always, for GCC deletes calls of a
  // function that does nothing else.
  __attribute__((always_inline)) static void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  static FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) {
    return (FloatLanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static ShortLanes pack(IntLanes first, IntLanes second) {
    return (ShortLanes)_mm512_packs_epi32((__m512i)first, (__m512i)second);
  }
  static int compress(int32_t* out, IntLanes ids, IntLanes keep) {
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)keep);
    // Not straight to memory: that is microcode on Zen 4.
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, (__m512i)ids));
    return __builtin_popcount(mask);
  }
};

}  // namespace

extern const IndexKernels kAvx512Index = {
    {quantize<float>, quantize<BFloat16>, quantize<Float16>},
    {sum_page<float>, sum_page<BFloat16>, sum_page<Float16>},
    {prepare<float>, prepare<BFloat16>, prepare<Float16>},
    estimate<Avx512Ops>,
    scan<Avx512Ops>,
    score<Avx512Ops>,
    pick<Avx512Ops>,
    verify<Avx512Ops>,
};

}  // namespace hybridgen
