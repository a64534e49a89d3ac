// The AMX path with the tile instructions modelled in software, to test it on machines that lack them. Products and
// sums are made as the instruction's definition has them: even and odd elements apart, subnormals being zero.

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "attend_inl.h"
#include "avx512_inl.h"

struct alignas(64) Tile {
  uint8_t row[16][64];
};
thread_local Tile tiles[3];

struct Tiles {
  template <int T>
  static void load(const void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(tiles[T].row[r], static_cast<const char*>(p) + r * stride, 64);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(p) + r * stride, tiles[T].row[r], 64);
  }
  template <int T>
  static void zero() { tiles[T] = {}; }

  static __m512 flush(__m512 x) {
    const __mmask16 normal = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(x, 0x20));
    return _mm512_maskz_mov_ps(normal, x);
  }
  template <int C, int A, int B>
  static void multiply_add() {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int m = 0; m < 16; ++m) {
      __m512 even = _mm512_setzero_ps();
      __m512 odd = _mm512_setzero_ps();
      for (int k = 0; k < 16; ++k) {
        uint32_t pair;
        __builtin_memcpy(&pair, tiles[A].row[m] + 4 * k, 4);
        const __m512i b = _mm512_loadu_si512(tiles[B].row[k]);
        const __m512 a_even = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair << 16)));
        const __m512 a_odd = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair & 0xffff0000u)));
        even = flush(_mm512_fmadd_ps(flush(a_even), flush(_mm512_castsi512_ps(_mm512_slli_epi32(b, 16))), even));
        odd = flush(_mm512_fmadd_ps(flush(a_odd), flush(_mm512_castsi512_ps(_mm512_and_si512(b, high))), odd));
      }
      float* c = reinterpret_cast<float*>(tiles[C].row[m]);
      _mm512_storeu_ps(c, _mm512_add_ps(_mm512_loadu_ps(c), _mm512_add_ps(even, odd)));
    }
  }
  static void configure() {}
  static void release() {}
};

#include "attend_amx_inl.h"

}  // namespace

extern const AttendFn kAttendAmxModel = attend_tiles;
extern const AttendFn kScoreAmxModel = score_tiles;

}  // namespace hybridgen
