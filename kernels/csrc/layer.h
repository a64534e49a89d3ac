// What a decoder layer does around attention, for few rows: each half is one call, so that nothing of Python runs
// between its products. The operations are those that would be called one by one, and give the same bits.
#pragma once

#include <cstdint>
#include <vector>

#include "attend.h"
#include "pool.h"

namespace hybridgen {

// Rows in the calling thread, or over the pool (unless null) when they are many.
void run_rows(Pool* pool, RowsFn fn, const RowsTask& task, int64_t rows, int64_t row_bytes);

struct LinearWeights {  // bfloat16
  const void* weight;   // [outputs, inputs]
  const void* bias;     // [outputs]  or null
  int64_t inputs;
  int64_t outputs;
};

// out = x @ weight.T + bias over the pool; rows of x_stride and out_stride elements. Throws std::invalid_argument
// where the pool's instruction set has no such product.
void run_linear(Pool& pool, const LinearWeights& weights, const void* x, int64_t x_stride, void* out,
                int64_t out_stride, int64_t rows);

struct LayerWeights {  // of a layer with norms before its blocks, RMS all of them, and an MLP gated by silu; bfloat16
  const void* attention_norm;  // [hidden]
  LinearWeights qkv;           // [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
  const void* q_norm;          // [head_dim]  or null, and so the next
  const void* k_norm;
  LinearWeights out;       // [hidden, num_heads * head_dim]
  const void* mlp_norm;    // [hidden]
  LinearWeights up;        // [2 * intermediate, hidden]
  LinearWeights down;      // [hidden, intermediate]
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  float eps;
};

class Layer {
 public:
  explicit Layer(const LayerWeights& weights);  // throws std::invalid_argument for shapes that do not go together

  // residual += x, unless x is null; heads = q, k and v of its norm, q and k normalised and rotated.
  //   x, residual: [rows, hidden]; heads: [rows, (num_heads + 2 * num_kv_heads) * head_dim]; all packed
  //   cos, sin: [rows, half]; half may be 0
  void enter(Pool& pool, int64_t rows, const std::byte* x, std::byte* residual, const float* cos, const float* sin,
             int64_t half, std::byte* heads) const;

  // residual += the projection of `attended`, [rows, num_heads * head_dim]; x = the MLP of its norm.
  void leave(Pool& pool, int64_t rows, const std::byte* attended, std::byte* residual, std::byte* x) const;

 private:
  void norm(Pool& pool, int64_t rows, const void* x, void* residual, const void* weight, void* out) const;

  const LayerWeights weights_;
  const int64_t hidden_;
};

}  // namespace hybridgen
