// Reading a buffer as fast as all threads can: the limit that attention's bytes per second are held against.
#include <algorithm>
#include <cstring>

#ifdef HYBRIDGEN_X86_64
#include <immintrin.h>
#endif

#include "pool.h"

namespace hybridgen {
namespace {

constexpr int64_t kPieceBytes = int64_t{4} << 20;
constexpr int64_t kStrideBytes = 8 * 64;  // eight sums that do not wait for each other

uint64_t sum_words(const std::byte* data, int64_t bytes) {
  uint64_t sums[8] = {};
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, data + at, 64);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  for (; at + 8 <= bytes; at += 8) {
    uint64_t word;
    std::memcpy(&word, data + at, 8);
    sums[0] += word;
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

#ifdef HYBRIDGEN_X86_64
__attribute__((target("avx512f"))) uint64_t sum_words_avx512(const std::byte* data, int64_t bytes) {
  __m512i sums[8];
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  const int64_t whole = bytes - bytes % kStrideBytes;
  for (int64_t at = 0; at < whole; at += kStrideBytes) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sums[i] = _mm512_add_epi64(sums[i], _mm512_loadu_si512(data + at + 64 * i));
  }
  for (int i = 1; i < 8; ++i) sums[0] = _mm512_add_epi64(sums[0], sums[i]);
  alignas(64) uint64_t words[8];
  _mm512_store_si512(words, sums[0]);
  uint64_t sum = sum_words(data + whole, bytes - whole);
  for (const uint64_t word : words) sum += word;
  return sum;
}
#endif

class ReadJob final : public Job {
 public:
  ReadJob(const void* data, int64_t bytes, int32_t num_groups)
      : data_(static_cast<const std::byte*>(data)), bytes_(bytes), num_groups_(num_groups) {
#ifdef HYBRIDGEN_X86_64
    if (__builtin_cpu_supports("avx512f")) sum_words_ = sum_words_avx512;
#endif
  }

  void begin_phase(int32_t phase, int32_t* num_items) override {
    if (phase > 0) return;
    const auto num_pieces = static_cast<int32_t>((bytes_ + kPieceBytes - 1) / kPieceBytes);
    for (int32_t group = 0; group < num_groups_; ++group) {
      num_items[group] = num_pieces / num_groups_ + (group < num_pieces % num_groups_ ? 1 : 0);
    }
  }
  void run_item(int32_t, int32_t group, int32_t item, Worker&) override {
    const int64_t begin = (int64_t{item} * num_groups_ + group) * kPieceBytes;
    sum_.fetch_add(sum_words_(data_ + begin, std::min(kPieceBytes, bytes_ - begin)), std::memory_order_relaxed);
  }
  int64_t scratch_bytes() const override { return 0; }
  const char* name() const override { return "read"; }
  uint64_t sum() const { return sum_.load(); }

 private:
  const std::byte* const data_;
  const int64_t bytes_;
  const int32_t num_groups_;
  uint64_t (*sum_words_)(const std::byte*, int64_t) = sum_words;
  std::atomic<uint64_t> sum_{0};
};

}  // namespace

uint64_t Pool::read(const void* data, int64_t bytes) {
  ReadJob job(data, bytes, num_groups());
  run(job);
  return job.sum();
}

}  // namespace hybridgen
