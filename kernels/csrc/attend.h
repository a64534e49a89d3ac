// What the shared code and the kernels of each ISA agree on: shapes, sizes, one task. No instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hybridgen {

enum class Dtype : int32_t { float32, bfloat16, float16 };
constexpr int kNumDtypes = 3;

constexpr int64_t dtype_bytes(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

constexpr int kGroupTokens = 16;    // keys repacked together: a page holds whole groups
constexpr int kChunkTokens = 64;    // keys repacked before they are used: they stay in L1
constexpr int kAheadTokens = 64;    // how far rows are prefetched
constexpr int kBlockTokens = 512;   // attended at once; boundaries are absolute, so results do not depend on who works
constexpr int kTileRows = 48;       // (query, head) rows that share one pass over a block, unless the group is larger
constexpr int kMaxHeadDim = 512;

// Row strides in bytes: an odd number of cache lines, so that rows do not compete for the same L1 sets.
constexpr int kScoreRowBytes = 33 * 64;  // holds kBlockTokens floats
template <class T>
constexpr int kQueryStride = ((kMaxHeadDim * static_cast<int>(sizeof(T)) / 64) | 1) * 64 / static_cast<int>(sizeof(T));

struct AttendTask {       // some queries of one sequence against a run of key blocks on one tier, for one KV head
  const void* k;          // [num_pages, .., page_size, head_dim]  this layer and head in page 0
  const void* v;          // like k
  int64_t page_stride;    // elements from one page to the next, in k and in v
  const int32_t* pages;   // the sequence's pages on this tier, in token order: key i lies in pages[i / page_size]
  int32_t num_keys;       // keys that may be read, visible or not; a multiple of 16 or the length of `selected`
  const int32_t* selected;  // [num_keys]  ascending keys to attend; null: all. Blocks, begin and end count in it
  int32_t page_size;
  int32_t head_dim;
  int32_t num_queries;
  int32_t group;          // query heads per KV head
  const int32_t* begin;   // [num_queries]  a query sees keys [begin, end); neither decreases from query to query
  const int32_t* end;
  float scale;
  float soft_cap;         // 0: none
  const void* q;          // [num_queries, group, head_dim]  rows of q_stride elements
  int64_t q_stride;
  int32_t block_begin;    // key blocks [block_begin, block_end)
  int32_t block_end;
  float* partial;         // [blocks, partial_floats(rows, head_dim)]  or null: finish here
  int32_t partial_begin;  // the block that partial[0] belongs to
  void* out;              // [num_queries, group, head_dim]  rows of out_stride elements
  int64_t out_stride;
  bool out_float32;       // otherwise the dtype of q
  float* lse;             // [num_queries, group]  rows of lse_stride elements, natural log; may be null
  int64_t lse_stride;
  float* logits;          // [num_queries, group, logits_stride]  q.k of key i at place i, not scaled: written by
                          // `score`; given to `attend`, those of `selected` are taken from here and K is not read
  int64_t logits_stride;  // a multiple of kBlockTokens
  float* block_sums;      // [num_queries, group, logits_stride / kBlockTokens, 2]  written by `score`: the maximum of a
                          // block's scaled logits in units of log 2, and the sum of 2^(logit - maximum)
};

// One block's partial: out [rows, head_dim] not yet divided by its sum, then maximum and sum [rows] each.
constexpr int64_t partial_floats(int64_t rows, int64_t head_dim) { return rows * (head_dim + 2); }

// Upper bound for every ISA and dtype. Some take rows 16 at a time.
constexpr int64_t attend_scratch_bytes(int64_t rows, int64_t head_dim) {
  const int64_t query = kQueryStride<float> * 4;
  const int64_t chunk = kChunkTokens * ((head_dim + 31) / 32 * 32) * 4;
  rows = (rows + 15) / 16 * 16;
  return rows * (query + kScoreRowBytes) + 2 * 4 * partial_floats(rows, head_dim) + chunk + 6 * 64;
}

using AttendFn = void (*)(const AttendTask& task, std::byte* scratch);

struct RowsTask {  // one of the small row-wise operations; rows [begin, end)
  const void* x;   // rms_norm: [rows, n]; silu_and_mul: [rows, 2n]
  int64_t x_stride;
  void* residual;  // [rows, n]  or null
  int64_t residual_stride;
  const void* weight;  // [n]
  void* out;           // [rows, n]
  int64_t out_stride;
  int64_t n;
  float eps;
  // rotary only
  void* heads[2];           // q and k: [rows, num_heads[i], head_dim]
  int64_t heads_stride[2];  // elements between rows
  int32_t num_heads[2];
  int32_t head_dim;
  const float* cos;  // [rows, n]   n = half of the rotated dims
  const float* sin;
  // merge only
  const float* parts[2];     // [rows, n]
  const float* part_lse[2];  // [rows]  natural log
  float* lse;                // [rows]  or null
};

using RowsFn = void (*)(const RowsTask& task, int64_t begin, int64_t end);

struct LinearTask {    // out = x @ weight.T + bias, all bfloat16, sums in float32
  const void* x;       // [rows, inputs]  rows of x_stride elements
  int64_t x_stride;
  const void* weight;  // [outputs, inputs]
  const void* bias;    // [outputs]  or null
  void* out;           // [rows, outputs]  rows of out_stride elements
  int64_t out_stride;
  int64_t rows;
  int64_t inputs;
};

using LinearFn = void (*)(const LinearTask& task, int64_t begin, int64_t end);  // outputs [begin, end)

struct Kernels {
  AttendFn attend[kNumDtypes];
  AttendFn fold[kNumDtypes];  // combine the partials of blocks [block_begin, block_end) and write the result
  AttendFn score[kNumDtypes];  // write the logits of these blocks, and read nothing but keys
  RowsFn rms_norm[kNumDtypes];
  RowsFn rotary[kNumDtypes];
  RowsFn silu_and_mul[kNumDtypes];
  RowsFn merge[kNumDtypes];
  LinearFn linear = nullptr;  // null: none on this path
};

}  // namespace hybridgen
