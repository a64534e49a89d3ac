// Paged attention, the algorithm once. Each ISA includes this inside its own anonymous namespace and passes `Ops`:
//
//   Element                 what K and V pages hold
//   Query                   what query rows and softmax weights are packed as
//   kVectorPairs            (even, odd) pairs in one vector
//   kRows, kVectors         register tile: rows x vectors of accumulators
//   Acc, Pairs, Broadcast   accumulators (one float sum per pair), a vector of pairs, one pair in every place
//   load(p), load_tail(p, num_pairs), keep(pairs, even, odd), broadcast(p), multiply_add(acc, pairs, broadcast)
//   store(acc, out, num)    the sums of the first `num` pairs
//   softmax(...)            a row of scores to a row of weights, in place
//   prefetch(p)
//
// Scores: a vector holds one dim pair of consecutive tokens (K pages are laid out so), a query row broadcasts its
// dim pair, and each sum is one token's dot product: no transpose and no horizontal sums. Values: a vector holds a
// token pair of consecutive dims, a row of weights broadcasts its token pair. Both loops are the same tile.
//
// Every sum is one chain in a fixed order, whatever the tile, and blocks are merged left to right: a row's result
// depends neither on the rows computed beside it nor on how the blocks were shared out.

constexpr int kAheadGroups = 4;  // how far V is prefetched; K by the height of its tile, which is at most this
constexpr int kBlockPointers = 2 * kBlockGroups + kAheadGroups;

template <class Ops>
struct Block {  // the keys of one block that at least one row sees
  using Element = typename Ops::Element;
  // Groups of 16 tokens in the order they are read: K, then V, then some that may be read next.
  const Element* groups[kBlockPointers];
  int num_groups;
  int origin;  // position of the first token of the first group
  int begin;   // visible tokens [begin, end), counted from the first token of the first group
  int end;
};

template <class Ops, int R, int X>
void score_tile(const typename Ops::Query* q, const typename Ops::Element* const* groups, int ahead, int first_vector,
                int head_dim, float* scores) {
  using Element = typename Ops::Element;
  constexpr int kVectorPairs = Ops::kVectorPairs;
  constexpr int kStride = kQueryStride<typename Ops::Query>;
  const Element* k[X];
  const Element* next[X];
  typename Ops::Acc acc[R][X];
#pragma GCC unroll 16
  for (int x = 0; x < X; ++x) {
    const int token = (first_vector + x) * kVectorPairs;
    k[x] = groups[token / kGroupTokens] + token % kGroupTokens * 2;
    next[x] = groups[token / kGroupTokens + ahead] + token % kGroupTokens * 2;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][x] = {};
  }
  const int64_t num_elements = static_cast<int64_t>(head_dim) * kGroupTokens;
  for (int64_t i = 0; i < num_elements; i += 2 * kGroupTokens, q += 2) {
    typename Ops::Pairs pairs[X];
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      pairs[x] = Ops::load(k[x] + i);
      Ops::prefetch(next[x] + i);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Ops::Broadcast pair = Ops::broadcast(q + r * kStride);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) Ops::multiply_add(acc[r][x], pairs[x], pair);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      Ops::store(acc[r][x], scores + r * (kScoreRowBytes / 4) + (first_vector + x) * kVectorPairs, kVectorPairs);
    }
  }
}

template <class Ops, int R, int X>
void value_tile(const typename Ops::Query* weights, const Block<Ops>& block, int head_dim, int first_dim, float* out) {
  using Element = typename Ops::Element;
  constexpr int kVectorPairs = Ops::kVectorPairs;
  constexpr int kStride = kScoreRowBytes / static_cast<int>(sizeof(typename Ops::Query));
  constexpr int kGroupPairs = kGroupTokens / 2;
  const Element* const* groups = block.groups + block.num_groups;
  const int last = head_dim - first_dim - (X - 1) * kVectorPairs;
  const int tail = last < kVectorPairs ? last : kVectorPairs;
  typename Ops::Acc acc[R][X];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) acc[r][x] = {};
  }

  // A weight of zero does not silence a NaN: the half of an edge pair that nobody sees is cleared in V itself.
  auto step = [&](const Element* v, const typename Ops::Query* weight, bool edge, bool even, bool odd)
      __attribute__((always_inline)) {
    typename Ops::Pairs pairs[X];
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      pairs[x] = x < X - 1 ? Ops::load(v + x * kVectorPairs * 2) : Ops::load_tail(v + x * kVectorPairs * 2, tail);
      if (edge) pairs[x] = Ops::keep(pairs[x], even, odd);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Ops::Broadcast pair = Ops::broadcast(weight + r * kStride);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) Ops::multiply_add(acc[r][x], pairs[x], pair);
    }
  };
  auto edge_step = [&](int pair, bool even, bool odd) __attribute__((always_inline)) {
    const Element* v = groups[pair / kGroupPairs] + (pair % kGroupPairs * head_dim + first_dim) * 2;
    step(v, weights + pair * 2, true, even, odd);
  };

  // Whole pairs [begin, end); a cut pair before or after them is an edge.
  const int begin = (block.begin + 1) / 2;
  const int end = block.end / 2;
  if (block.begin % 2 != 0) edge_step(block.begin / 2, false, true);
  for (int pair = begin; pair < end;) {
    const int group = pair / kGroupPairs;
    const int group_end = (group + 1) * kGroupPairs < end ? (group + 1) * kGroupPairs : end;
    const Element* v = groups[group] + (pair % kGroupPairs * head_dim + first_dim) * 2;
    const Element* next = groups[group + kAheadGroups] + (pair % kGroupPairs * head_dim + first_dim) * 2;
    for (; pair < group_end; ++pair, v += 2 * head_dim, next += 2 * head_dim) {
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) Ops::prefetch(next + x * kVectorPairs * 2);
      step(v, weights + pair * 2, false, true, true);
    }
  }
  if (block.end % 2 != 0 && block.end > block.begin) edge_step(block.end / 2, true, false);

#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      Ops::store(acc[r][x], out + static_cast<int64_t>(r) * head_dim + first_dim + x * kVectorPairs,
                 x < X - 1 ? kVectorPairs : tail);
    }
  }
}

template <class Ops>
struct Tiles {
  using Score = void (*)(const typename Ops::Query*, const typename Ops::Element* const*, int, int, int, float*);
  using Value = void (*)(const typename Ops::Query*, const Block<Ops>&, int, int, float*);

  template <int R>
  static void score(int vectors, const typename Ops::Query* q, const typename Ops::Element* const* groups, int ahead,
                    int first_vector, int head_dim, float* scores) {
    if constexpr (Ops::kVectors >= 4) {
      if (vectors == 4) return score_tile<Ops, R, 4>(q, groups, ahead, first_vector, head_dim, scores);
      if (vectors == 3) return score_tile<Ops, R, 3>(q, groups, ahead, first_vector, head_dim, scores);
    }
    if constexpr (Ops::kVectors >= 2) {
      if (vectors == 2) return score_tile<Ops, R, 2>(q, groups, ahead, first_vector, head_dim, scores);
    }
    return score_tile<Ops, R, 1>(q, groups, ahead, first_vector, head_dim, scores);
  }

  template <int R>
  static void value(int vectors, const typename Ops::Query* weights, const Block<Ops>& block, int head_dim,
                    int first_dim, float* out) {
    if constexpr (2 * R <= Ops::kRows && Ops::kVectors >= 4) {  // few rows: wider, so that V streams through once
      if (vectors == 8) return value_tile<Ops, R, 8>(weights, block, head_dim, first_dim, out);
      if (vectors == 7) return value_tile<Ops, R, 7>(weights, block, head_dim, first_dim, out);
      if (vectors == 6) return value_tile<Ops, R, 6>(weights, block, head_dim, first_dim, out);
      if (vectors == 5) return value_tile<Ops, R, 5>(weights, block, head_dim, first_dim, out);
    }
    if constexpr (Ops::kVectors >= 4) {
      if (vectors == 4) return value_tile<Ops, R, 4>(weights, block, head_dim, first_dim, out);
      if (vectors == 3) return value_tile<Ops, R, 3>(weights, block, head_dim, first_dim, out);
    }
    if constexpr (Ops::kVectors >= 2) {
      if (vectors == 2) return value_tile<Ops, R, 2>(weights, block, head_dim, first_dim, out);
    }
    return value_tile<Ops, R, 1>(weights, block, head_dim, first_dim, out);
  }

  // Calls `fn` with the row count as a compile-time constant.
  template <class Fn>
  static void with_rows(int rows, Fn&& fn) {
    if constexpr (Ops::kRows >= 6) {
      if (rows == 6) return fn.template operator()<6>();
      if (rows == 5) return fn.template operator()<5>();
    }
    if constexpr (Ops::kRows >= 4) {
      if (rows == 4) return fn.template operator()<4>();
      if (rows == 3) return fn.template operator()<3>();
    }
    if constexpr (Ops::kRows >= 2) {
      if (rows == 2) return fn.template operator()<2>();
    }
    return fn.template operator()<1>();
  }
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int min_int(int a, int b) { return a < b ? a : b; }
inline int max_int(int a, int b) { return a > b ? a : b; }

// Rows [begin, end) of scores: as few passes as the register tile allows, of nearly equal height.
template <class Ops>
void score_block(const typename Ops::Query* q, const Block<Ops>& block, int rows, int head_dim, float* scores) {
  const int num_vectors = block.num_groups * kGroupTokens / Ops::kVectorPairs;
  const int step = ceil_div(rows, ceil_div(rows, Ops::kRows));
  constexpr int kTileGroups = Ops::kVectors * Ops::kVectorPairs / kGroupTokens;
  for (int vector = 0; vector < num_vectors; vector += Ops::kVectors) {
    const int vectors = min_int(Ops::kVectors, num_vectors - vector);
    for (int row = 0; row < rows; row += step) {
      // Later passes find their keys in L1 and need not look ahead.
      const int ahead = row == 0 ? max_int(kTileGroups, 1) : 0;
      Tiles<Ops>::with_rows(min_int(step, rows - row), [&]<int R>() {
        Tiles<Ops>::template score<R>(vectors, q + row * kQueryStride<typename Ops::Query>, block.groups, ahead, vector,
                                      head_dim, scores + row * (kScoreRowBytes / 4));
      });
    }
  }
}

template <class Ops>
void value_block(const float* scores, const Block<Ops>& block, int rows, int head_dim, float* out) {
  const int num_vectors = ceil_div(head_dim, Ops::kVectorPairs);
  const int step = ceil_div(rows, ceil_div(rows, Ops::kRows));
  const int widest = 2 * step <= Ops::kRows && Ops::kVectors >= 4 ? 2 * Ops::kVectors : Ops::kVectors;
  const int width = ceil_div(num_vectors, ceil_div(num_vectors, widest));
  for (int row = 0; row < rows; row += step) {
    const auto* weights = reinterpret_cast<const typename Ops::Query*>(scores + row * (kScoreRowBytes / 4));
    for (int vector = 0; vector < num_vectors; vector += width) {
      Tiles<Ops>::with_rows(min_int(step, rows - row), [&]<int R>() {
        Tiles<Ops>::template value<R>(min_int(width, num_vectors - vector), weights, block, head_dim,
                                      vector * Ops::kVectorPairs, out + static_cast<int64_t>(row) * head_dim);
      });
    }
  }
}

struct Partial {   // attention of `rows` rows over some keys
  float* out;      // [rows, head_dim]  not divided by `sum`
  float* maximum;  // [rows]  of the scaled logits, in units of log 2; -inf: no keys
  float* sum;      // [rows]  of 2^(logit - maximum)
};

inline Partial partial_at(float* p, int rows, int head_dim) {
  float* maximum = p + static_cast<int64_t>(rows) * head_dim;
  return {p, maximum, maximum + rows};
}

// total := total + part. Left to right only: the order is part of the result.
inline void fold_partial(const Partial& total, const Partial& part, int rows, int head_dim) {
  for (int r = 0; r < rows; ++r) {
    if (part.sum[r] == 0.0f) continue;
    float* a = total.out + static_cast<int64_t>(r) * head_dim;
    const float* b = part.out + static_cast<int64_t>(r) * head_dim;
    // The larger maximum gets the weight 1 exactly; a total that saw no keys yet has maximum -inf, weight 0.
    const float maximum = total.maximum[r] > part.maximum[r] ? total.maximum[r] : part.maximum[r];
    const float weight_a = __builtin_exp2f(total.maximum[r] - maximum);
    const float weight_b = __builtin_exp2f(part.maximum[r] - maximum);
    total.maximum[r] = maximum;
    total.sum[r] = total.sum[r] * weight_a + part.sum[r] * weight_b;
    for (int i = 0; i < head_dim; ++i) a[i] = a[i] * weight_a + b[i] * weight_b;
  }
}

inline void clear_partial(const Partial& total, int rows, int head_dim) {
  for (int64_t i = 0; i < static_cast<int64_t>(rows) * head_dim; ++i) total.out[i] = 0.0f;
  for (int r = 0; r < rows; ++r) {
    total.maximum[r] = -__builtin_inff();
    total.sum[r] = 0.0f;
  }
}

template <class T>
void write_row(const float* out, float inverse, int head_dim, T* dst) {
  for (int i = 0; i < head_dim; ++i) dst[i] = from_float<T>(out[i] * inverse);
}

template <class Element>
void write_result(const AttendTask& task, const Partial& total) {
  constexpr float kLn2 = 0.693147180559945f;
  for (int r = 0; r < task.num_queries * task.group; ++r) {
    const int64_t query = r / task.group;
    const int64_t head = r % task.group;
    const float sum = total.sum[r];
    const float inverse = sum > 0.0f ? 1.0f / sum : (sum == 0.0f ? 0.0f : sum);
    const float* row = total.out + static_cast<int64_t>(r) * task.head_dim;
    const int64_t offset = query * task.out_stride + head * task.head_dim;
    if (task.out_float32) {
      write_row(row, inverse, task.head_dim, static_cast<float*>(task.out) + offset);
    } else {
      write_row(row, inverse, task.head_dim, static_cast<Element*>(task.out) + offset);
    }
    if (task.lse != nullptr) {
      task.lse[query * task.lse_stride + head] =
          sum == 0.0f ? -__builtin_inff() : total.maximum[r] * kLn2 + __builtin_logf(sum);
    }
  }
}

// The keys of block number `index` that some row of the task sees. Empty when end <= begin.
template <class Ops>
void find_block(const AttendTask& task, int index, Block<Ops>& block) {
  using Element = typename Ops::Element;
  const int window_begin = task.sliding_window > 0 ? task.position - task.sliding_window + 1 : 0;
  const int begin = max_int(index * kBlockTokens, window_begin);
  const int end = min_int((index + 1) * kBlockTokens, task.position + task.num_queries);
  const int first_group = begin / kGroupTokens;
  block.origin = first_group * kGroupTokens;
  block.begin = begin - block.origin;
  block.end = end - block.origin;
  block.num_groups = end > begin ? ceil_div(end, kGroupTokens) - first_group : 0;
  const int page_groups = task.page_size / kGroupTokens;
  const int64_t group_elements = static_cast<int64_t>(kGroupTokens) * task.head_dim;
  const int n = block.num_groups;
  const int last_group = (task.position + task.num_queries - 1) / kGroupTokens;
  for (int i = 0; i < n; ++i) {
    const int group = first_group + i;
    const int64_t offset =
        task.block_table[group / page_groups] * task.page_stride + group % page_groups * group_elements;
    block.groups[i] = static_cast<const Element*>(task.k) + offset;
    block.groups[n + i] = static_cast<const Element*>(task.v) + offset;
  }
  // What a look-ahead past the end finds: the next block's keys, or the last group again.
  for (int i = 0; n > 0 && i < kAheadGroups; ++i) {
    const int group = first_group + n + i;
    const int64_t offset = task.block_table[min_int(group, last_group) / page_groups] * task.page_stride +
                           group % page_groups * group_elements;
    block.groups[2 * n + i] = static_cast<const Element*>(task.k) + offset;
  }
}

template <class Ops>
void attend_block(const AttendTask& task, int index, const typename Ops::Query* q, float* scores, const Partial& part) {
  const int rows = task.num_queries * task.group;
  Block<Ops> block;
  find_block(task, index, block);
  if (block.end <= block.begin) return clear_partial(part, rows, task.head_dim);
  score_block<Ops>(q, block, rows, task.head_dim, scores);
  const int num_tokens = block.num_groups * kGroupTokens;
  for (int r = 0; r < rows; ++r) {
    const int end = task.position + r / task.group + 1 - block.origin;  // what this row sees: [end - window, end)
    const int row_begin = task.sliding_window > 0 ? max_int(block.begin, end - task.sliding_window) : block.begin;
    const int row_end = min_int(block.end, end);
    Ops::softmax(scores + r * (kScoreRowBytes / 4), row_begin, row_end, num_tokens, task.scale, task.soft_cap,
                 part.maximum[r], part.sum[r]);
  }
  value_block<Ops>(scores, block, rows, task.head_dim, part.out);
}

template <class T>
T* carve(std::byte*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  scratch = reinterpret_cast<std::byte*>(p + count);
  return p;
}

template <class Ops>
void attend(const AttendTask& task, std::byte* scratch) {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;
  const int rows = task.num_queries * task.group;
  Query* q = carve<Query>(scratch, static_cast<int64_t>(rows) * kQueryStride<Query>);
  float* scores = carve<float>(scratch, static_cast<int64_t>(rows) * (kScoreRowBytes / 4));
  const Partial part = partial_at(carve<float>(scratch, partial_floats(rows, task.head_dim)), rows, task.head_dim);
  const Partial total = partial_at(carve<float>(scratch, partial_floats(rows, task.head_dim)), rows, task.head_dim);

  for (int r = 0; r < rows; ++r) {
    const Element* row = static_cast<const Element*>(task.q) + r / task.group * task.q_stride +
                         static_cast<int64_t>(r % task.group) * task.head_dim;
    Ops::pack(row, task.head_dim, q + static_cast<int64_t>(r) * kQueryStride<Query>);
  }
  if (task.partial != nullptr) {
    for (int index = task.block_begin; index < task.block_end; ++index) {
      attend_block<Ops>(task, index, q, scores,
                        partial_at(task.partial + (index - task.partial_begin) * partial_floats(rows, task.head_dim), rows, task.head_dim));
    }
    return;
  }
  clear_partial(total, rows, task.head_dim);
  for (int index = task.block_begin; index < task.block_end; ++index) {
    attend_block<Ops>(task, index, q, scores, part);
    fold_partial(total, part, rows, task.head_dim);
  }
  write_result<Element>(task, total);
}

template <class Ops>
void fold(const AttendTask& task, std::byte* scratch) {
  const int rows = task.num_queries * task.group;
  const Partial total = partial_at(carve<float>(scratch, partial_floats(rows, task.head_dim)), rows, task.head_dim);
  clear_partial(total, rows, task.head_dim);
  for (int index = task.block_begin; index < task.block_end; ++index) {
    fold_partial(total, partial_at(task.partial + (index - task.partial_begin) * partial_floats(rows, task.head_dim), rows, task.head_dim),
                 rows, task.head_dim);
  }
  write_result<typename Ops::Element>(task, total);
}
