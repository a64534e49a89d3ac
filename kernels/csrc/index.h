// An int8 index of K: what each key's logit is, nearly, at half the bytes of bfloat16 or less. Selection reads it in
// full and then K and V of the few tokens that matter. No instructions here: shapes, sizes and the tasks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "attend.h"

namespace hybridgen {

constexpr int kIndexGroup = 16;   // tokens whose dim quads lie side by side
constexpr int kIndexDims = 32;    // dims that share a scale
constexpr int kIndexUnit = 32;    // tokens whose weights and keys are one vector
constexpr int kIndexBlock = 2048; // tokens to an item at least; boundaries are absolute, so results do not depend on who works
constexpr int kBlockUnits = kIndexBlock / kIndexUnit;

// One page, layer and KV head: [page_size/16] groups of
//   uint8   [dims/4][16 tokens][4]   K / scale, rounded, plus 128: the unsigned operand of vpdpbusd
//   float16 [dims/32][16 tokens]     scale: max |K| of the token's 32 dims / 127; NaN: not to be estimated
// with dims = head_dim rounded up to 32, each group rounded up to 64 bytes.
constexpr int32_t index_chunks(int32_t head_dim) { return (head_dim + kIndexDims - 1) / kIndexDims; }
constexpr int64_t index_group_bytes(int32_t head_dim) {
  const int64_t bytes = int64_t{index_chunks(head_dim)} * (kIndexDims + 2) * kIndexGroup;
  return (bytes + 63) / 64 * 64;
}

// Weights, scores and keys. A token's weight is 2^(estimated logit - reference - 40), for each query head, rounded to
// bfloat16 and its logarithm taken to be linear between powers of two (within -4 % and +2 %, 0 on average: less than
// the error of an estimate). Its score is its softmax probability by the estimates, averaged over the query heads of
// the group; its key is the upper half of the score's bits, so that keys order as scores do.
//
// A unit of 32 uint16 holds tokens in the order of vpackssdw: 0 1 2 3, 16 17 18 19, 4 5 6 7, 20 21 22 23, and so on.
constexpr int32_t place_in_unit(int32_t token) { return token % 16 / 4 * 8 + token / 16 * 4 + token % 4; }
constexpr float kReferenceWeight = -40.0f;        // log 2; a later key may have a logit 167 * log 2 above the reference
constexpr uint32_t kAlways = 0xffff;              // key of a token that is attended in any case
constexpr uint32_t kLowestKey = (127 - 40) << 7;  // 2^-40; below, tokens are counted together
constexpr int kKeyShift = 3;                      // keys to a bin: 16 bins to an octave
constexpr int kAlwaysBin = ((127 << 7) >> kKeyShift) - (kLowestKey >> kKeyShift) + 1;
constexpr int kBins = (kAlwaysBin + 16) / 16 * 16;

constexpr int32_t bin_of(uint32_t key) {  // 0x10000, past every key: kBins
  if (key >= 0x10000) return kBins;
  const auto bin = static_cast<int32_t>(key >> kKeyShift) - static_cast<int32_t>(kLowestKey >> kKeyShift);
  return bin < 0 ? 0 : bin > kAlwaysBin ? kAlwaysBin : bin;
}

struct Index {  // of a tier's pages
  std::byte* k = nullptr;  // [num_pages, num_layers, num_kv_heads, page_size / 16, group_bytes]  null: there is none
  float* v_sum = nullptr;  // [num_pages, num_layers, num_kv_heads, head_dim]
  int64_t k_stride = 0;      // bytes from a page to the next
  int64_t v_sum_stride = 0;  // floats
};

// A KV head's queries for the scan. Written by `prepare` into index_query_bytes(group, head_dim) bytes.
struct IndexQuery {
  int32_t group;   // query heads
  int32_t chunks;  // of kIndexDims dims
  float soft_cap;  // of the logits; 0: none
  bool finite;     // otherwise nothing can be estimated
  int8_t* codes;   // [group, chunks * 32]
  int32_t* bias;   // [group, chunks]  -128 * the sum of the codes
  float* factor;   // [group, chunks]  to logits, in units of log 2 unless soft_cap is set
  float* error;    // [group, chunks]  standard deviation of an estimate, in units of log 2, for a key's scale of 1
  float* largest;  // [group, chunks]  magnitude that an estimate can have, in units of log 2, for a key's scale of 1
};
constexpr int64_t index_query_bytes(int64_t group, int32_t head_dim) {
  return group * index_chunks(head_dim) * (kIndexDims + 16) + 5 * 64;
}

struct ScanTask {              // blocks [block_begin, block_end) of one sequence's keys, for one KV head
  const std::byte* index;      // this layer and head in page 0
  int64_t page_stride;         // bytes
  const int32_t* block_table;  // [ceil(num_tokens / page_size)]
  int32_t page_size;           // a multiple of 16
  int32_t head_dim;
  int32_t num_tokens;  // at least 1
  int32_t num_sinks;   // tokens at the beginning that are attended in any case; their keys' scales are not typical
  IndexQuery query;
  int32_t block_begin;
  int32_t block_end;
  int32_t num_blocks;  // of all num_tokens
  float* reference;    // [group]  written, the same by every task: the largest estimate of the first unit
  uint16_t* weights;   // [num_blocks, 64 units, group, 32]
  float* sum;          // [group, num_blocks]  of the weights; not finite: estimates are too far from the reference
  float* scale;        // [2, chunks, num_blocks]  the largest of the keys' scales; then that of the sinks' groups too.
                       // inf: a key cannot be estimated
};
constexpr int64_t scan_scratch_bytes(int64_t group, int32_t head_dim) {
  return group * (kIndexUnit + 48) * 4 + index_chunks(head_dim) * 64 + 2 * index_group_bytes(head_dim) + 4 * 64;
}

struct ScoreTask {  // weights of blocks [block_begin, block_end) to keys and how many tokens each bin holds
  int32_t group;
  int32_t num_tokens;
  int32_t num_sinks;     // tokens [0, num_sinks) and [always_begin, num_tokens) are always attended
  int32_t always_begin;
  int32_t block_begin;
  int32_t block_end;
  const uint16_t* weights;  // [num_blocks, 64, group, 32]
  const float* factor;      // [group]  weight to score: 1 / (group * sum of all weights)
  uint16_t* keys;           // [num_blocks, 64, 32]
  uint32_t* histogram;      // [num_blocks, kBins]
};
constexpr int64_t kScoreScratchBytes = 4 * kBins * 4 + 64;

struct PickTask {  // the tokens of blocks [block_begin, block_end) whose keys are in [low, high)
  int32_t group;
  int32_t num_blocks;
  int32_t num_tokens;
  int32_t block_begin;
  int32_t block_end;
  uint32_t low;
  uint32_t high;            // 0x10000: no limit
  const uint16_t* weights;  // [num_blocks, 64, group, 32]
  const uint16_t* keys;     // [num_blocks, 64, 32]
  int32_t* tokens;          // ascending; has room for 16 more
  float* rest;              // [group, num_blocks]  weights of the tokens whose keys are below `low`, added up
};

constexpr int64_t pick_scratch_bytes(int64_t group) { return group * 64 + 64; }

struct VerifyTask {  // how the mass of tokens that were left out changes with the query, by every eighth unit of them
  ScanTask scan;            // of the new query; `weights`, `sum` and `scale` are not used
  uint32_t low;             // tokens whose keys are below this were left out
  const uint16_t* keys;     // [num_blocks, 64, 32]  of the old query, and so are
  const uint16_t* weights;  // [num_blocks, 64, group, 32]
  float* before;            // [group, num_blocks]  weights of the sampled tokens, added up
  float* now;               // [group, num_blocks]  by the new query
};
constexpr int kVerifyStride = 8;

struct IndexKernels {
  // Keys [num_tokens] rows of k_stride elements, to the places of tokens [first, first + num_tokens) in `page`, one
  // layer and head of a page. The same bits on every ISA.
  void (*quantize[kNumDtypes])(const void* k, int64_t k_stride, int32_t num_tokens, int32_t first, int32_t head_dim,
                               std::byte* page);
  // v_sum[d] = sum over the page's tokens of V, in their order. v: [page_size, head_dim] packed.
  void (*sum_page[kNumDtypes])(const void* v, int32_t page_size, int32_t head_dim, float* v_sum);
  // q: [group, head_dim] packed; `memory` holds what the result points to.
  IndexQuery (*prepare[kNumDtypes])(const void* q, int32_t group, int32_t head_dim, float scale, float soft_cap,
                                    std::byte* memory);
  // Estimated logits of tokens [32 unit, 32 unit + 32), in units of log 2: out [group, 32]. NaN: not to be
  // estimated. Past the last token they are those of a key of zeros.
  void (*estimate)(const ScanTask& task, int32_t unit, float* out, std::byte* scratch);
  void (*scan)(const ScanTask& task, std::byte* scratch);
  void (*score)(const ScoreTask& task, std::byte* scratch);
  int32_t (*pick)(const PickTask& task, std::byte* scratch);  // returns how many
  void (*verify)(const VerifyTask& task, std::byte* scratch);  // as much scratch as `scan`
};

struct SelectTask {  // all of `scan`, `score` and `pick` for one KV head, in the calling thread
  ScanTask scan;     // index to query; the rest is filled in
  int32_t always_begin;
  double mass;       // of the softmax that the tokens are to hold, by the estimates
};
struct Selection {
  bool estimated;               // otherwise all tokens are selected, and nothing else is known
  std::vector<int32_t> tokens;  // ascending
  std::vector<float> lse;       // [group]  of all tokens, by the estimates, natural log
  std::vector<float> rest;      // [group]  softmax mass of the tokens not selected, by the estimates
};
Selection select(const IndexKernels& kernels, const SelectTask& task);

// Whether a scan's sums and scales mean anything: every key and query was finite and no estimate so large that it
// overflowed on the way.
bool is_estimable(const IndexQuery& query, int32_t num_blocks, const float* sum, const float* scale);

// The lowest key so that tokens with smaller keys hold at most `budget` of the estimated softmax mass.
uint32_t find_threshold(const uint32_t* histogram, double budget);

// The index kernels that the path called `isa` uses: avx512 (and what builds on it) has vpdpbusd and falls back to
// avx2 on CPUs without it. Throws std::invalid_argument as find_kernels does.
const IndexKernels& find_index_kernels(const std::string& isa);

}  // namespace hybridgen
