// AMX: bfloat16 by tiles; every other dtype is as in avx512_bf16.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "attend_inl.h"
#include "avx512_inl.h"

struct Tiles {
  // The intrinsics paste the number of the tile into the instruction's name.
  template <int T>
  static void load(const void* p, int64_t stride) {
    if constexpr (T == 0) _tile_loadd(0, p, stride);
    if constexpr (T == 1) _tile_loadd(1, p, stride);
    if constexpr (T == 2) _tile_loadd(2, p, stride);
  }
  template <int T>
  static void store(void* p, int64_t stride) {
    static_assert(T == 0);
    _tile_stored(0, p, stride);
  }
  template <int T>
  static void zero() {
    static_assert(T == 0);
    _tile_zero(0);
  }
  template <int C, int A, int B>
  static void multiply_add() {
    static_assert(C == 0 && A == 1 && B == 2);
    _tile_dpbf16ps(0, 1, 2);
  }

  // Tiles 0 to 2: 16 rows of 64 bytes.
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64};
      uint8_t rows[16] = {16, 16, 16};
    } const config;
    _tile_loadconfig(&config);
  }
  static void release() { _tile_release(); }
};

#include "attend_amx_inl.h"

}  // namespace

// Linux keeps the tiles of those processes only that ask.
bool enable_amx() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

extern const AttendFn kAttendAmx = attend_tiles;
extern const AttendFn kScoreAmx = score_tiles;

}  // namespace hybridgen
