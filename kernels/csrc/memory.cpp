#include "memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <random>
#include <utility>

#ifdef HYBRIDGEN_X86_64
#include <immintrin.h>
#endif

namespace hybridgen {
namespace {

constexpr unsigned kMoveOwn = 1 << 1;      // MPOL_MF_MOVE, of <linux/mempolicy.h>
constexpr unsigned kLockOnFault = 1;       // MLOCK_ONFAULT, of <linux/mman.h>
constexpr int64_t kLine = 64;
constexpr int kMaskBits = 8 * sizeof(unsigned long);

int result(long answer) { return answer < 0 ? errno : 0; }

}  // namespace

int set_policy(uintptr_t address, int64_t bytes, int mode, const std::vector<int32_t>& nodes) {
  std::vector<unsigned long> mask;
  for (const int32_t node : nodes) {
    if (node < 0) return EINVAL;
    const auto word = static_cast<size_t>(node / kMaskBits);
    if (word >= mask.size()) mask.resize(word + 1);
    mask[word] |= 1UL << (node % kMaskBits);
  }
  // The kernel reads one bit less than it is told of.
  const unsigned long max_node = mask.empty() ? 0 : mask.size() * kMaskBits + 1;
  return result(syscall(SYS_mbind, address, bytes, mode, mask.empty() ? nullptr : mask.data(), max_node, 0U));
}

int move_pages(const uintptr_t* addresses, int64_t count, const int32_t* nodes, int32_t* status, int64_t* num_left) {
  const long answer = syscall(SYS_move_pages, 0, count, addresses, nodes, status, kMoveOwn);
  *num_left = answer > 0 ? answer : 0;
  return result(answer);
}

int advise(uintptr_t address, int64_t bytes, int advice) {
  return result(madvise(reinterpret_cast<void*>(address), static_cast<size_t>(bytes), advice));
}

int lock_on_fault(uintptr_t address, int64_t bytes) {
  return result(syscall(SYS_mlock2, address, bytes, kLockOnFault));
}

int unlock(uintptr_t address, int64_t bytes) {
  return result(munlock(reinterpret_cast<void*>(address), static_cast<size_t>(bytes)));
}

double chase(uintptr_t address, int64_t bytes, int64_t num_reads) {
  if (num_reads < 2 || bytes / kLine < num_reads) return 0;
  const int64_t lines_per_part = bytes / kLine / num_reads;
  std::mt19937_64 random(0);
  std::vector<void**> lines(static_cast<size_t>(num_reads));
  for (int64_t part = 0; part < num_reads; ++part) {
    const int64_t line = part * lines_per_part + static_cast<int64_t>(random() % static_cast<uint64_t>(lines_per_part));
    lines[static_cast<size_t>(part)] = reinterpret_cast<void**>(address + static_cast<uintptr_t>(line * kLine));
  }
  for (size_t last = lines.size() - 1; last > 0; --last) std::swap(lines[last], lines[random() % (last + 1)]);
  for (size_t i = 0; i < lines.size(); ++i) *lines[i] = lines[(i + 1) % lines.size()];
#ifdef HYBRIDGEN_X86_64
  for (void** const line : lines) _mm_clflush(line);
  _mm_mfence();
#else
  // What the reads below would find in a cache is pushed out by writing the whole buffer around it.
  for (int64_t at = 8; at < bytes; at += kLine) *reinterpret_cast<volatile char*>(address + static_cast<uintptr_t>(at)) = 1;
#endif
  void** volatile at = lines[0];
  void** line = at;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t read = 0; read < num_reads; ++read) line = static_cast<void**>(*line);
  at = line;  // so that the reads are not left out
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
  return time.count() / static_cast<double>(num_reads);
}

}  // namespace hybridgen
