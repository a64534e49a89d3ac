// AVX2 and FMA: int8 products as int16 pairs (the saturating byte instruction would not be exact).

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "index.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "index_inl.h"

struct Avx2Ops {
  static constexpr int kRows = 2;

  template <int R, class Sink>
  static void tile(const std::byte* const* groups, const std::byte* const* next, const IndexQuery& query, int row,
                   Sink&& sink) {
    constexpr int kChunkBytes = kIndexDims * kIndexGroup;
    const int chunks = query.chunks;
    const __m256i even_bytes = _mm256_set1_epi16(0x00ff);
    float out[R][kIndexUnit];
    for (int x = 0; x < 2; ++x) {
      __m256 sums[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
      for (int chunk = 0; chunk < chunks; ++chunk) {
        const std::byte* codes = groups[x] + int64_t{chunk} * kChunkBytes;
        const std::byte* ahead = next[x] + int64_t{chunk} * kChunkBytes;
        __m256i dots[R][2];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          dots[r][0] = dots[r][1] = _mm256_set1_epi32(query.bias[int64_t{row + r} * chunks + chunk]);
        }
        for (int quad = 0; quad < kIndexDims / 4; ++quad) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead + quad * 64), _MM_HINT_T1);
          __m256i even[2];
          __m256i odd[2];
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m256i raw =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + quad * 64 + half * 32));
            even[half] = _mm256_and_si256(raw, even_bytes);
            odd[half] = _mm256_srli_epi16(raw, 8);
          }
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const int8_t* q = query.codes + (int64_t{row + r} * chunks + chunk) * kIndexDims + quad * 4;
            const __m256i q_even = _mm256_set1_epi32((q[0] & 0xffff) | q[2] * 65536);
            const __m256i q_odd = _mm256_set1_epi32((q[1] & 0xffff) | q[3] * 65536);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
              const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even[half], q_even),
                                                        _mm256_madd_epi16(odd[half], q_odd));
              dots[r][half] = _mm256_add_epi32(dots[r][half], products);
            }
          }
        }
        const std::byte* scales = groups[x] + int64_t{chunks} * kChunkBytes + chunk * kIndexGroup * 2;
        _mm_prefetch(reinterpret_cast<const char*>(next[x] + (scales - groups[x])), _MM_HINT_T1);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256 scale =
              _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + half * 16)));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            const __m256 factor = _mm256_set1_ps(query.factor[int64_t{row + r} * chunks + chunk]);
            sums[r][half] =
                _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r][half]), _mm256_mul_ps(scale, factor), sums[r][half]);
          }
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        _mm256_storeu_ps(out[r] + x * kIndexGroup, sums[r][0]);
        _mm256_storeu_ps(out[r] + x * kIndexGroup + 8, sums[r][1]);
      }
    }
    for (int r = 0; r < R; ++r) sink(r, load_lanes<FloatLanes>(out[r]), load_lanes<FloatLanes>(out[r] + 16));
  }
  static FloatLanes multiply_add(FloatLanes a, FloatLanes b, FloatLanes c) { return a * b + c; }
  static ShortLanes pack(IntLanes first, IntLanes second) {
    __m256i a[2];
    __m256i b[2];
    __builtin_memcpy(a, &first, 64);
    __builtin_memcpy(b, &second, 64);
    const __m256i packed[2] = {_mm256_packs_epi32(a[0], b[0]), _mm256_packs_epi32(a[1], b[1])};
    return load_lanes<ShortLanes>(packed);
  }
  static int compress(int32_t* out, IntLanes ids, IntLanes keep) {
    int count = 0;
    for (int i = 0; i < 16; ++i) {
      out[count] = ids[i];
      count -= keep[i];
    }
    return count;
  }
};

}  // namespace

extern const IndexKernels kAvx2Index = {
    {quantize<float>, quantize<BFloat16>, quantize<Float16>},
    {sum_page<float>, sum_page<BFloat16>, sum_page<Float16>},
    {prepare<float>, prepare<BFloat16>, prepare<Float16>},
    estimate<Avx2Ops>,
    scan<Avx2Ops>,
    score<Avx2Ops>,
    pick<Avx2Ops>,
    verify<Avx2Ops>,
};

}  // namespace hybridgen
