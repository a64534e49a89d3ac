#include "index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "isa.h"

namespace hybridgen {

extern const IndexKernels kScalarIndex;
#ifdef HYBRIDGEN_X86_64
extern const IndexKernels kAvx2Index;
extern const IndexKernels kAvx512Index;
#endif

namespace {

constexpr float kLargestEstimate = 0x1p23f;  // times 128 it is to fit in 32 bits, with room for the reference

}  // namespace

bool is_estimable(const IndexQuery& query, int32_t num_blocks, const float* sum, const float* scale) {
  if (!query.finite) return false;
  for (int64_t i = 0; i < int64_t{query.group} * num_blocks; ++i) {
    if (!std::isfinite(sum[i])) return false;
  }
  for (int32_t chunk = 0; chunk < query.chunks; ++chunk) {
    float widest = 0;
    for (int32_t block = 0; block < num_blocks; ++block) {
      widest = std::max(widest, scale[int64_t{query.chunks + chunk} * num_blocks + block]);
    }
    for (int32_t row = 0; row < query.group; ++row) {
      if (!(query.largest[int64_t{row} * query.chunks + chunk] * widest * query.chunks < kLargestEstimate)) return false;
    }
  }
  return true;
}

Selection select(const IndexKernels& kernels, const SelectTask& task) {
  ScanTask scan = task.scan;
  const int32_t group = scan.query.group;
  const int32_t num_blocks = (scan.num_tokens + kIndexBlock - 1) / kIndexBlock;
  const size_t capacity = static_cast<size_t>(num_blocks) * kIndexBlock;
  std::vector<uint16_t> weights(capacity * group);
  std::vector<uint16_t> keys(capacity);
  std::vector<uint32_t> histogram(static_cast<size_t>(num_blocks) * kBins);
  std::vector<float> reference(group);
  std::vector<float> sum(static_cast<size_t>(num_blocks) * group);
  std::vector<float> rest(sum.size());
  std::vector<float> scale(static_cast<size_t>(num_blocks) * scan.query.chunks * 2);
  std::vector<std::byte> scratch(
      std::max({scan_scratch_bytes(group, scan.head_dim), kScoreScratchBytes, pick_scratch_bytes(group)}));
  scan.block_begin = 0;
  scan.block_end = num_blocks;
  scan.num_blocks = num_blocks;
  scan.reference = reference.data();
  scan.weights = weights.data();
  scan.sum = sum.data();
  scan.scale = scale.data();
  kernels.scan(scan, scratch.data());

  Selection selection;
  selection.estimated = is_estimable(scan.query, num_blocks, sum.data(), scale.data());
  if (!selection.estimated) {
    for (int32_t token = 0; token < scan.num_tokens; ++token) selection.tokens.push_back(token);
    return selection;
  }
  std::vector<float> factor(group);
  for (int32_t row = 0; row < group; ++row) {
    float total = 0;
    for (int32_t block = 0; block < num_blocks; ++block) total += sum[int64_t{row} * num_blocks + block];
    factor[row] = 1.0f / (total * static_cast<float>(group));
    selection.lse.push_back((reference[row] - kReferenceWeight + std::log2(total)) * 0.693147181f);
  }
  ScoreTask score{group, scan.num_tokens, scan.num_sinks, task.always_begin, 0, num_blocks,
                  weights.data(), factor.data(), keys.data(), histogram.data()};
  kernels.score(score, scratch.data());
  std::vector<uint32_t> bins(kBins);
  for (size_t i = 0; i < histogram.size(); ++i) bins[i % kBins] += histogram[i];
  selection.tokens.resize(scan.num_tokens + 16);
  PickTask pick{group, num_blocks, scan.num_tokens, 0, num_blocks, find_threshold(bins.data(), 1.0 - task.mass), 0x10000,
                weights.data(), keys.data(), selection.tokens.data(), rest.data()};
  selection.tokens.resize(kernels.pick(pick, scratch.data()));
  for (int32_t row = 0; row < group; ++row) {
    float total = 0;
    for (int32_t block = 0; block < num_blocks; ++block) total += rest[int64_t{row} * num_blocks + block];
    selection.rest.push_back(total * factor[row] * static_cast<float>(group));
  }
  return selection;
}

uint32_t find_threshold(const uint32_t* histogram, double budget) {
  double dropped = 0;
  for (int bin = 0; bin < kAlwaysBin; ++bin) {
    const uint32_t key = ((kLowestKey >> kKeyShift) + static_cast<uint32_t>(bin) + 1) << kKeyShift;
    // A bin's tokens count as its upper edge: what is dropped is never more than it seems.
    dropped += static_cast<double>(std::bit_cast<float>(key << 16)) * histogram[bin];
    if (dropped > budget) return bin == 0 ? 0 : key - (1u << kKeyShift);
  }
  return ((kLowestKey >> kKeyShift) + static_cast<uint32_t>(kAlwaysBin)) << kKeyShift;
}

const IndexKernels& find_index_kernels(const std::string& isa) {
  find_kernels(isa);  // throws when it is unknown or cannot run here
#ifdef HYBRIDGEN_X86_64
  if (isa == "scalar") return kScalarIndex;
  if (isa != "avx2" && __builtin_cpu_supports("avx512vnni")) return kAvx512Index;
  // Every CPU with AVX-512 has these.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2Index;
#endif
  return kScalarIndex;
}

}  // namespace hybridgen
