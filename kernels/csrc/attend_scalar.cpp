// The portable path: complete, and what every other path is tested against.

#include <cstddef>
#include <cstdint>

#include "attend.h"

namespace hybridgen {
namespace {

#include "element.h"
#include "attend_inl.h"
#include "rows_inl.h"

template <class T>
struct ScalarOps {
  using Element = T;
  using Query = float;
  using Packed = float;
  static constexpr int kVectorPairs = 16;
  static constexpr bool kTiles = false;
  static constexpr int kScoreRows = 1;
  static constexpr int kRows = 1;
  static constexpr int kVectors = 1;

  struct Acc {
    float sum[kVectorPairs] = {};
  };
  struct Pairs {
    float even[kVectorPairs] = {};
    float odd[kVectorPairs] = {};
  };
  struct Broadcast {
    float even;
    float odd;
  };

  template <class Row>
  static void pack_keys(Row&& row, int head_dim, Packed* packed) {  // [head_dim][16]
    for (int j = 0; j < kGroupTokens; ++j) {
      const Element* k = row(j);
      for (int i = 0; i < head_dim; ++i) packed[i * kGroupTokens + j] = to_float(k[i]);
    }
  }
  template <int R>
  static void score_group(const Query* q, const Packed* packed, int head_dim, float* scores) {
    float sums[kGroupTokens] = {};
    for (int i = 0; i < head_dim; ++i) {
      for (int j = 0; j < kGroupTokens; ++j) sums[j] += packed[i * kGroupTokens + j] * q[i];
    }
    for (int j = 0; j < kGroupTokens; ++j) scores[j] = sums[j];
  }
  static Pairs join_values(const Element* even, const Element* odd, int num) {
    Pairs pairs;
    for (int i = 0; i < num; ++i) {
      pairs.even[i] = to_float(even[i]);
      pairs.odd[i] = to_float(odd[i]);
    }
    return pairs;
  }
  static void pack_values(const Element* even, const Element* odd, int head_dim, Packed* packed) {  // [2][head_dim]
    for (int i = 0; i < head_dim; ++i) {
      packed[i] = to_float(even[i]);
      packed[value_stride(head_dim) / 2 + i] = to_float(odd[i]);
    }
  }
  static Pairs load_values(const Packed* run, int head_dim, int dim) {
    Pairs pairs;
    for (int i = 0; i < kVectorPairs; ++i) {
      pairs.even[i] = run[dim + i];
      pairs.odd[i] = run[value_stride(head_dim) / 2 + dim + i];
    }
    return pairs;
  }
  static Broadcast broadcast(const Query* p) { return {p[0], p[1]}; }
  static void multiply_add(Acc& acc, const Pairs& pairs, Broadcast pair) {
    for (int i = 0; i < kVectorPairs; ++i) {
      acc.sum[i] += pairs.even[i] * pair.even;
      acc.sum[i] += pairs.odd[i] * pair.odd;
    }
  }
  static Acc load_acc(const float* out, int num) {
    Acc acc;
    for (int i = 0; i < num; ++i) acc.sum[i] = out[i];
    return acc;
  }
  static void store(const Acc& acc, float* out, int num) {
    for (int i = 0; i < num; ++i) out[i] = acc.sum[i];
  }
  static void prefetch(const void*) {}

  static void pack(const Element* row, int head_dim, Query* queries, int r) {
    Query* q = queries + static_cast<int64_t>(r) * kQueryStride<Query>;
    for (int i = 0; i < head_dim; ++i) q[i] = to_float(row[i]);
  }

  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    constexpr float kLog2E = 1.44269504088896f;
    maximum = -__builtin_inff();
    sum = 0.0f;
    for (int i = begin; i < end; ++i) {
      float logit = scores[i] * scale;
      if (soft_cap > 0.0f) logit = soft_cap * __builtin_tanhf(logit / soft_cap);
      scores[i] = logit * kLog2E;
      if (scores[i] > maximum) maximum = scores[i];
    }
    for (int i = 0; i < num; ++i) {
      const bool visible = begin <= i && i < end;
      scores[i] = visible ? __builtin_exp2f(scores[i] - maximum) : 0.0f;
      sum += scores[i];
    }
  }
};

}  // namespace

extern const Kernels kScalarKernels = {
    {attend<ScalarOps<float>>, attend<ScalarOps<BFloat16>>, attend<ScalarOps<Float16>>},
    {fold<ScalarOps<float>>, fold<ScalarOps<BFloat16>>, fold<ScalarOps<Float16>>},
    {score<ScalarOps<float>>, score<ScalarOps<BFloat16>>, score<ScalarOps<Float16>>},
    {rms_norm<float>, rms_norm<BFloat16>, rms_norm<Float16>},
    {rotary<float>, rotary<BFloat16>, rotary<Float16>},
    {silu_and_mul<float>, silu_and_mul<BFloat16>, silu_and_mul<Float16>},
    {merge<float>, merge<BFloat16>, merge<Float16>},
};

}  // namespace hybridgen
