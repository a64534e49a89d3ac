// Paged attention, the algorithm once. Each ISA includes this inside its own anonymous namespace and passes `Ops`:
//
//   Element                 what pages hold
//   Query                   what query rows and softmax weights are packed as
//   Packed                  what keys and values are repacked as
//   kScoreRows              rows whose scores are computed together
//   pack_keys(row, head_dim, packed)            the 16 rows row(0) .. row(15), to key_stride(head_dim) elements
//   score_group<R>(q, packed, head_dim, scores) the 16 scores of R query rows
//   kRows, kVectors         register tile for values: rows x vectors of accumulators
//   kVectorPairs            token pairs of as many dims in one vector; divides 16
//   Acc, Pairs, Broadcast   accumulators (one float sum per pair), a vector of pairs, one pair in every place
//   join_values(even, odd, num)                 the token pairs of `num` dims from two rows
//   pack_values(even, odd, head_dim, packed)    two rows to a run of value_stride(head_dim) elements
//   load_values(run, head_dim, dim)             the token pairs of kVectorPairs dims
//   broadcast(p), multiply_add(acc, pairs, broadcast)
//   load_acc(out, num), store(acc, out, num)    the sums of the first `num` pairs
//   pack(row, head_dim, q, r)                   row r of the queries; null: zeros
//   softmax(...)                                a row of scores to a row of weights, in place
//   prefetch(p)
//
// Ops that multiply whole tiles (kTiles) have score_rows and value_rows instead of score_group, the register tile and
// what goes with it: rows then come 16 at a time, the missing ones being zero.
//
// Keys lie in pages as rows, one token after another. For scores, 64 of them at a time are repacked in L1, so that
// vectors hold some dims of several tokens and a score needs no long horizontal sum. For values a vector holds a token
// pair of consecutive dims, joined from two rows as it is needed, or for many query rows repacked too. Rows may come
// from anywhere: a run of pages and a list of selected keys differ in one table of offsets.
//
// Every sum is one chain in a fixed order, whatever the tile, and blocks are merged left to right: a row's result
// depends neither on the rows computed beside it nor on how the blocks were shared out.

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int min_int(int a, int b) { return a < b ? a : b; }
inline int max_int(int a, int b) { return a > b ? a : b; }

constexpr int key_stride(int head_dim) { return (head_dim + 31) / 32 * 32 * kGroupTokens; }  // elements of 16 packed keys
constexpr int value_stride(int head_dim) { return (head_dim + 15) / 16 * 16 * 2; }         // of a packed token pair

struct Block {  // the keys of one block that at least one row sees
  int64_t offsets[kBlockTokens + kAheadTokens];  // elements from the first page to each key, then to some read next
  int num_keys;  // in whole groups of 16
  int origin;    // the first key
  int begin;     // visible keys [begin, end), counted from the first
  int end;
};

// One chunk's values: either rows as they lie in pages, or packed.
template <class Ops>
struct Values {
  const typename Ops::Element* const* rows;  // [2 * num_pairs]  null: packed
  const typename Ops::Element* const* next;  // [2 * num_pairs]  to be prefetched, with `rows`
  const typename Ops::Packed* packed;        // [num_pairs, value_stride]
  int num_pairs;
};

// out += weights * values, over the token pairs of one chunk.
template <class Ops, int R, int X, bool kPacked>
void value_tile(const typename Ops::Query* weights, const Values<Ops>& values, int head_dim, int first_dim, bool fresh,
                float* out) {
  constexpr int kVectorPairs = Ops::kVectorPairs;
  constexpr int kStride = kScoreRowBytes / static_cast<int>(sizeof(typename Ops::Query));
  constexpr int kLine = 64 / static_cast<int>(sizeof(typename Ops::Element));
  const int last = head_dim - first_dim - (X - 1) * kVectorPairs;
  const int tail = last < kVectorPairs ? last : kVectorPairs;
  typename Ops::Acc acc[R][X];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      acc[r][x] = {};
      if (!fresh) {
        acc[r][x] = Ops::load_acc(out + static_cast<int64_t>(r) * head_dim + first_dim + x * kVectorPairs,
                                  x < X - 1 ? kVectorPairs : tail);
      }
    }
  }
  const typename Ops::Packed* packed = values.packed;
  for (int pair = 0; pair < values.num_pairs; ++pair, weights += 2) {
    typename Ops::Pairs pairs[X];
    if constexpr (kPacked) {
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) pairs[x] = Ops::load_values(packed, head_dim, first_dim + x * kVectorPairs);
      packed += value_stride(head_dim);
    } else {
      const auto* even = values.rows[2 * pair] + first_dim;
      const auto* odd = values.rows[2 * pair + 1] + first_dim;
      for (int dim = 0; dim < X * kVectorPairs; dim += kLine) {
        Ops::prefetch(values.next[2 * pair] + first_dim + dim);
        Ops::prefetch(values.next[2 * pair + 1] + first_dim + dim);
      }
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) {
        pairs[x] = Ops::join_values(even + x * kVectorPairs, odd + x * kVectorPairs, x < X - 1 ? kVectorPairs : tail);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Ops::Broadcast weight = Ops::broadcast(weights + r * kStride);
#pragma GCC unroll 16
      for (int x = 0; x < X; ++x) Ops::multiply_add(acc[r][x], pairs[x], weight);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int x = 0; x < X; ++x) {
      Ops::store(acc[r][x], out + static_cast<int64_t>(r) * head_dim + first_dim + x * kVectorPairs,
                 x < X - 1 ? kVectorPairs : tail);
    }
  }
}

// Few rows: wider, so that their weights are broadcast once.
template <class Ops, int R>
constexpr int kWidest = 2 * R <= Ops::kRows && Ops::kVectors >= 4 ? 2 * Ops::kVectors : Ops::kVectors;

template <class Ops, bool kPacked, int R, int X = kWidest<Ops, R>>
void value_columns(int vectors, const typename Ops::Query* weights, const Values<Ops>& values, int head_dim,
                   int first_dim, bool fresh, float* out) {
  if constexpr (X > 1) {
    if (vectors < X) {
      return value_columns<Ops, kPacked, R, X - 1>(vectors, weights, values, head_dim, first_dim, fresh, out);
    }
  }
  value_tile<Ops, R, X, kPacked>(weights, values, head_dim, first_dim, fresh, out);
}

// Calls `fn` with the row count, at most R, as a compile-time constant.
template <int R, class Fn>
void with_rows(int rows, Fn&& fn) {
  if constexpr (R > 1) {
    if (rows < R) return with_rows<R - 1>(rows, static_cast<Fn&&>(fn));
  }
  fn.template operator()<R>();
}

// Scores of one chunk for all rows: as few passes as the register tile allows, of nearly equal height.
template <class Ops>
void score_rows(const typename Ops::Query* q, const typename Ops::Packed* packed, int num_keys, int rows, int head_dim,
                 float* scores) {
  const int step = ceil_div(rows, ceil_div(rows, Ops::kScoreRows));
  for (int row = 0; row < rows; row += step) {
    with_rows<Ops::kScoreRows>(min_int(step, rows - row), [&]<int R>() {
      for (int key = 0; key < num_keys; key += kGroupTokens) {
        Ops::template score_group<R>(q + static_cast<int64_t>(row) * kQueryStride<typename Ops::Query>,
                                     packed + static_cast<int64_t>(key / kGroupTokens) * key_stride(head_dim), head_dim,
                                     scores + row * (kScoreRowBytes / 4) + key);
      }
    });
  }
}

template <class Ops, bool kPacked>
void value_rows(const typename Ops::Query* weights, const Values<Ops>& values, int rows, int head_dim, bool fresh,
                 float* out) {
  constexpr int kStride = kScoreRowBytes / static_cast<int>(sizeof(typename Ops::Query));
  const int num_vectors = ceil_div(head_dim, Ops::kVectorPairs);
  const int step = ceil_div(rows, ceil_div(rows, Ops::kRows));
  for (int row = 0; row < rows; row += step) {
    with_rows<Ops::kRows>(min_int(step, rows - row), [&]<int R>() {
      const int width = ceil_div(num_vectors, ceil_div(num_vectors, kWidest<Ops, R>));
      for (int vector = 0; vector < num_vectors; vector += width) {
        value_columns<Ops, kPacked, R>(min_int(width, num_vectors - vector), weights + row * kStride, values, head_dim,
                                       vector * Ops::kVectorPairs, fresh, out + static_cast<int64_t>(row) * head_dim);
      }
    });
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
inline void find_block(const AttendTask& task, int index, Block& block) {
  const int begin = max_int(index * kBlockTokens, task.begin[0]);
  const int end = min_int((index + 1) * kBlockTokens, task.end[task.num_queries - 1]);
  block.origin = begin / kChunkTokens * kChunkTokens;
  block.begin = begin - block.origin;
  block.end = end - block.origin;
  block.num_keys = end > begin ? ceil_div(end - block.origin, kGroupTokens) * kGroupTokens : 0;
  if (block.num_keys == 0) return;
  const int head_dim = task.head_dim;
  const int num_offsets = block.num_keys + kAheadTokens;  // what a look-ahead past the end finds: the next keys, if any
  if (task.selected != nullptr) {
    const int shift = (task.page_size & (task.page_size - 1)) == 0 ? __builtin_ctz(task.page_size) : -1;
    for (int i = 0; i < num_offsets; ++i) {
      const int key = task.selected[min_int(block.origin + i, task.num_keys - 1)];
      const int page = shift >= 0 ? key >> shift : key / task.page_size;
      block.offsets[i] = task.pages[page] * task.page_stride + static_cast<int64_t>(key - page * task.page_size) * head_dim;
    }
    return;
  }
  const int page_groups = task.page_size / kGroupTokens;
  const int last_group = task.num_keys / kGroupTokens - 1;
  for (int i = 0; i < num_offsets; i += kGroupTokens) {
    const int group = min_int((block.origin + i) / kGroupTokens, last_group);
    const int page = group / page_groups;
    const int64_t offset = task.pages[page] * task.page_stride +
                           static_cast<int64_t>(group - page * page_groups) * kGroupTokens * head_dim;
    for (int j = 0; j < kGroupTokens; ++j) block.offsets[i + j] = offset + static_cast<int64_t>(j) * head_dim;
  }
}

template <class Element>
const Element* zero_row() {
  alignas(64) static const Element zeros[kMaxHeadDim] = {};
  return zeros;
}

// The rows of a block in the order they are read: its keys, its values, then the keys of what follows.
template <class Element>
struct Stream {
  const Element* k;
  const Element* v;
  const Block& block;

  const Element* operator[](int i) const {
    const int n = block.num_keys;
    return i < n ? k + block.offsets[i] : i < 2 * n ? v + block.offsets[i - n] : k + block.offsets[i - n];
  }
};

// kValues: whether the block's values are read next, else the keys of what follows.
template <class Ops, bool kValues>
void score_block(const AttendTask& task, const Block& block, const typename Ops::Query* q,
                 typename Ops::Packed* packed, float* scores) {
  using Element = typename Ops::Element;
  constexpr int kLine = 64 / static_cast<int>(sizeof(Element));
  const auto* k = static_cast<const Element*>(task.k);
  const Stream<Element> stream{k, static_cast<const Element*>(task.v), block};
  const int rows = task.num_queries * task.group;
  for (int chunk = 0; chunk < block.num_keys; chunk += kChunkTokens) {
    const int num = min_int(kChunkTokens, block.num_keys - chunk);
    for (int i = 0; i < num; i += kGroupTokens) {
      const int64_t* offsets = block.offsets + chunk + i;
      for (int j = 0; j < kGroupTokens; ++j) {
        const int ahead = chunk + i + j + kAheadTokens;
        const Element* next = kValues ? stream[ahead] : k + block.offsets[ahead];
        for (int dim = 0; dim < task.head_dim; dim += kLine) Ops::prefetch(next + dim);
      }
      Ops::pack_keys([&](int j) { return k + offsets[j]; }, task.head_dim,
                     packed + static_cast<int64_t>(i / kGroupTokens) * key_stride(task.head_dim));
    }
    if constexpr (Ops::kTiles) {
      Ops::score_rows(q, packed, num, rows, task.head_dim, scores + chunk);
    } else {
      score_rows<Ops>(q, packed, num, rows, task.head_dim, scores + chunk);
    }
  }
}

template <class Ops>
void value_block(const AttendTask& task, const Block& block, const float* scores, typename Ops::Packed* packed,
                 float* out) {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;
  const auto* v = static_cast<const Element*>(task.v);
  const Stream<Element> stream{static_cast<const Element*>(task.k), v, block};
  const int rows = task.num_queries * task.group;
  const bool pack = Ops::kTiles || rows > Ops::kRows;  // several passes over the same values
  const Element* row[kChunkTokens];
  const Element* next[kChunkTokens];
  for (int chunk = 0; chunk < block.num_keys; chunk += kChunkTokens) {
    const int num = min_int(kChunkTokens, block.num_keys - chunk);
    for (int i = 0; i < num; ++i) {
      // A weight of zero does not silence a NaN: what nobody sees becomes zero.
      const bool visible = block.begin <= chunk + i && chunk + i < block.end;
      row[i] = visible ? v + block.offsets[chunk + i] : zero_row<Element>();
      next[i] = stream[block.num_keys + chunk + i + kAheadTokens];
    }
    const auto* weights = reinterpret_cast<const Query*>(scores) + chunk;
    const Values<Ops> values{row, next, packed, num / 2};
    if constexpr (!Ops::kTiles) {
      if (!pack) {
        value_rows<Ops, false>(weights, values, rows, task.head_dim, chunk == 0, out);
        continue;
      }
    }
    for (int i = 0; i < num; i += 2) {
      for (int dim = 0; dim < task.head_dim; dim += 64 / static_cast<int>(sizeof(Element))) {
        Ops::prefetch(next[i] + dim);
        Ops::prefetch(next[i + 1] + dim);
      }
      Ops::pack_values(row[i], row[i + 1], task.head_dim,
                       packed + static_cast<int64_t>(i / 2) * value_stride(task.head_dim));
    }
    if constexpr (Ops::kTiles) {
      Ops::value_rows(weights, packed, num / 2, rows, task.head_dim, chunk == 0, out);
    } else {
      value_rows<Ops, true>(weights, values, rows, task.head_dim, chunk == 0, out);
    }
  }
}

inline void find_scores(const AttendTask& task, const Block& block, float* scores) {
  for (int r = 0; r < task.num_queries * task.group; ++r) {
    const float* logits = task.logits + r * task.logits_stride;
    float* row = scores + r * (kScoreRowBytes / 4);
    for (int i = 0; i < block.num_keys; ++i) row[i] = logits[task.selected[min_int(block.origin + i, task.num_keys - 1)]];
  }
}

template <class Ops>
void attend_block(const AttendTask& task, int index, const typename Ops::Query* q, float* scores,
                  typename Ops::Packed* packed, const Partial& part) {
  const int rows = task.num_queries * task.group;
  Block block;
  find_block(task, index, block);
  if (block.num_keys == 0) return clear_partial(part, rows, task.head_dim);
  if (task.logits == nullptr) {
    score_block<Ops, true>(task, block, q, packed, scores);
  } else {
    find_scores(task, block, scores);
  }
  for (int r = 0; r < rows; ++r) {
    const int query = r / task.group;
    const int row_begin = max_int(block.begin, task.begin[query] - block.origin);
    const int row_end = min_int(block.end, task.end[query] - block.origin);
    Ops::softmax(scores + r * (kScoreRowBytes / 4), row_begin, row_end, block.num_keys, task.scale, task.soft_cap,
                 part.maximum[r], part.sum[r]);
  }
  value_block<Ops>(task, block, scores, packed, part.out);
}

template <class T>
T* carve(std::byte*& scratch, int64_t count) {
  T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch) + 63) & ~uintptr_t{63});
  scratch = reinterpret_cast<std::byte*>(p + count);
  return p;
}

// Rows that queries and scores have room for.
template <class Ops>
int padded_rows(int rows) {
  return Ops::kTiles ? ceil_div(rows, 16) * 16 : rows;
}

template <class Ops>
void pack_queries(const AttendTask& task, typename Ops::Query* q) {
  const int rows = task.num_queries * task.group;
  for (int r = 0; r < padded_rows<Ops>(rows); ++r) {
    const auto* row = static_cast<const typename Ops::Element*>(task.q) + r / task.group * task.q_stride +
                      static_cast<int64_t>(r % task.group) * task.head_dim;
    Ops::pack(r < rows ? row : nullptr, task.head_dim, q, r);
  }
}

template <class Ops>
void attend(const AttendTask& task, std::byte* scratch) {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;
  const int rows = task.num_queries * task.group;
  Query* q = carve<Query>(scratch, static_cast<int64_t>(padded_rows<Ops>(rows)) * kQueryStride<Query>);
  float* scores = carve<float>(scratch, static_cast<int64_t>(padded_rows<Ops>(rows)) * (kScoreRowBytes / 4));
  const Partial part = partial_at(carve<float>(scratch, partial_floats(rows, task.head_dim)), rows, task.head_dim);
  const Partial total = partial_at(carve<float>(scratch, partial_floats(rows, task.head_dim)), rows, task.head_dim);
  auto* packed = carve<typename Ops::Packed>(scratch, kChunkTokens / kGroupTokens * static_cast<int64_t>(key_stride(task.head_dim)));

  if (task.logits == nullptr) pack_queries<Ops>(task, q);
  if (task.partial != nullptr) {
    for (int index = task.block_begin; index < task.block_end; ++index) {
      float* partial = task.partial + (index - task.partial_begin) * partial_floats(rows, task.head_dim);
      attend_block<Ops>(task, index, q, scores, packed, partial_at(partial, rows, task.head_dim));
    }
    return;
  }
  clear_partial(total, rows, task.head_dim);
  for (int index = task.block_begin; index < task.block_end; ++index) {
    attend_block<Ops>(task, index, q, scores, packed, part);
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

template <class Ops>
void score(const AttendTask& task, std::byte* scratch) {
  using Query = typename Ops::Query;
  const int rows = task.num_queries * task.group;
  const int64_t num_blocks = task.logits_stride / kBlockTokens;
  Query* q = carve<Query>(scratch, static_cast<int64_t>(padded_rows<Ops>(rows)) * kQueryStride<Query>);
  float* scores = carve<float>(scratch, static_cast<int64_t>(padded_rows<Ops>(rows)) * (kScoreRowBytes / 4));
  auto* packed = carve<typename Ops::Packed>(scratch, kChunkTokens / kGroupTokens * static_cast<int64_t>(key_stride(task.head_dim)));
  pack_queries<Ops>(task, q);
  for (int index = task.block_begin; index < task.block_end; ++index) {
    Block block;
    find_block(task, index, block);
    if (block.num_keys > 0) score_block<Ops, false>(task, block, q, packed, scores);
    for (int r = 0; r < rows; ++r) {
      const int begin = max_int(block.begin, task.begin[r / task.group] - block.origin);
      const int end = min_int(block.end, task.end[r / task.group] - block.origin);
      float* row = scores + r * (kScoreRowBytes / 4);
      float* logits = task.logits + r * task.logits_stride + block.origin;
      for (int i = begin; i < end; ++i) logits[i] = row[i];
      float* sums = task.block_sums + (r * num_blocks + index) * 2;
      Ops::softmax(row, begin, end, block.num_keys, task.scale, task.soft_cap, sums[0], sums[1]);
    }
  }
}
