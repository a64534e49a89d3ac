// The int8 index of K, the algorithm once. Each ISA includes this inside its own anonymous namespace and passes `Ops`:
//
//   kRows                     query heads that share one pass over two groups of keys
//   tile<R>(groups, next, query, row, sink)
//                             calls sink(r, first, second) with the estimates of groups[0] and groups[1] for heads
//                             [row, row + R); `next`: groups to prefetch meanwhile
//   multiply_add(a, b, c)     a * b + c, fused or not
//   pack(first, second)       int32 to int16 with saturation, in the order of a unit
//   compress(out, ids, keep)  the ids whose lane of `keep` is set, in order; returns how many
//
// Everything else is in the compiler's vector types, which every ISA has.

typedef float FloatLanes __attribute__((vector_size(64)));
typedef int32_t IntLanes __attribute__((vector_size(64)));
typedef uint32_t BitLanes __attribute__((vector_size(64)));
typedef uint16_t HalfLanes __attribute__((vector_size(64)));

#define HYBRIDGEN_INLINE inline __attribute__((always_inline))

constexpr float kInfinity = __builtin_inff();
constexpr IntLanes kLaneIds = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class Lanes, class T>
HYBRIDGEN_INLINE Lanes load_lanes(const T* p) {
  Lanes lanes;
  __builtin_memcpy(&lanes, p, sizeof(lanes));
  return lanes;
}
template <class Lanes, class T>
HYBRIDGEN_INLINE void store_lanes(T* p, Lanes lanes) {
  __builtin_memcpy(p, &lanes, sizeof(lanes));
}
HYBRIDGEN_INLINE float sum_lanes(FloatLanes x) {
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
}

typedef int16_t ShortLanes __attribute__((vector_size(64)));

constexpr ShortLanes kUnitTokens = {0, 1, 2,  3,  16, 17, 18, 19, 4,  5,  6,  7,  20, 21, 22, 23,
                                    8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31};

// Zeroes all but the first `num` tokens of a unit.
HYBRIDGEN_INLINE HalfLanes keep_first(HalfLanes unit, int num) {
  num = num < 0 ? 0 : num > kIndexUnit ? kIndexUnit : num;
  return unit & (HalfLanes)(kUnitTokens < static_cast<int16_t>(num));
}
// Tokens 0 to 15 and 16 to 31 of a unit, widened.
HYBRIDGEN_INLINE BitLanes first_half(HalfLanes unit) {
  return (BitLanes)__builtin_shufflevector(unit, HalfLanes{}, 0, 32, 1, 32, 2, 32, 3, 32, 8, 32, 9, 32, 10, 32, 11, 32,
                                           16, 32, 17, 32, 18, 32, 19, 32, 24, 32, 25, 32, 26, 32, 27, 32);
}
HYBRIDGEN_INLINE BitLanes second_half(HalfLanes unit) {
  return (BitLanes)__builtin_shufflevector(unit, HalfLanes{}, 4, 32, 5, 32, 6, 32, 7, 32, 12, 32, 13, 32, 14, 32, 15,
                                           32, 20, 32, 21, 32, 22, 32, 23, 32, 28, 32, 29, 32, 30, 32, 31, 32);
}

// 2^x for x <= 0, relative error at most 1e-4; 2^-126 for anything smaller than that.
template <class Ops>
HYBRIDGEN_INLINE FloatLanes exp2_lanes(FloatLanes x) {
  const FloatLanes lowest = FloatLanes{} - 126.0f;
  x = x > lowest ? x : lowest;
  const FloatLanes magic = FloatLanes{} + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, kept in the low bits
  const FloatLanes shifted = x + magic;
  const FloatLanes f = x - (shifted - magic);
  FloatLanes p = FloatLanes{} + 0.05517162f;  // minimax on |f| <= 1/2
  p = Ops::multiply_add(p, f, FloatLanes{} + 0.24261163f);
  p = Ops::multiply_add(p, f, FloatLanes{} + 0.693261f);
  p = Ops::multiply_add(p, f, FloatLanes{} + 0.99992806f);
  return p * (FloatLanes)(((BitLanes)shifted + 127u) << 23);
}

// ---- K to the index, V to sums ----

template <class T>
void quantize(const void* k, int64_t k_stride, int32_t num_tokens, int32_t first, int32_t head_dim, std::byte* page) {
  const int chunks = index_chunks(head_dim);
  const int64_t group_bytes = index_group_bytes(head_dim);
  for (int token = 0; token < num_tokens; ++token) {
    const T* row = static_cast<const T*>(k) + token * k_stride;
    std::byte* group = page + (first + token) / kIndexGroup * group_bytes;
    const int lane = (first + token) % kIndexGroup;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int begin = chunk * kIndexDims;
      const int dims = head_dim - begin < kIndexDims ? head_dim - begin : kIndexDims;
      float x[kIndexDims] = {};
      if (dims == kIndexDims) {
        for (int i = 0; i < kIndexDims; ++i) x[i] = to_float(row[begin + i]);
      } else {
        for (int i = 0; i < dims; ++i) x[i] = to_float(row[begin + i]);
      }
      uint32_t largest = 0;  // as bits: orders magnitudes, with inf and NaN above all
      for (int i = 0; i < kIndexDims; ++i) {
        const uint32_t magnitude = __builtin_bit_cast(uint32_t, x[i]) & 0x7fffffffu;
        largest = largest > magnitude ? largest : magnitude;
      }
      Float16 scale = from_float<Float16>(__builtin_bit_cast(float, largest) * (1.0f / 127.0f));
      const bool estimable = largest < 0x7f800000u && scale.bits < 0x7c00u;
      if (!estimable) scale.bits = 0x7e00u;
      const float inverse = estimable && scale.bits != 0 ? 1.0f / to_float(scale) : 0.0f;
      uint8_t codes[kIndexDims];
      for (int i = 0; i < kIndexDims; ++i) {
        float code = inverse == 0.0f ? 0.0f : x[i] * inverse;
        code = code < 127.0f ? code : 127.0f;  // the scale itself was rounded
        code = code > -127.0f ? code : -127.0f;
        const float shifted = code + 12582912.0f;  // rounds to an integer in the low bits
        codes[i] = static_cast<uint8_t>(__builtin_bit_cast(uint32_t, shifted) + 128u);
      }
      std::byte* out = group + (int64_t{begin} / 4 * kIndexGroup + lane) * 4;
      for (int i = 0; i < kIndexDims; i += 4) __builtin_memcpy(out + i * kIndexGroup, codes + i, 4);
      std::byte* scales = group + int64_t{chunks} * kIndexDims * kIndexGroup;
      __builtin_memcpy(scales + (chunk * kIndexGroup + lane) * 2, &scale, 2);
    }
  }
}

template <class T>
void sum_page(const void* v, int32_t page_size, int32_t head_dim, float* v_sum) {
  const T* row = static_cast<const T*>(v);
  for (int i = 0; i < head_dim; ++i) v_sum[i] = to_float(row[i]);
  for (int token = 1; token < page_size; ++token) {
    row += head_dim;
    for (int i = 0; i < head_dim; ++i) v_sum[i] += to_float(row[i]);
  }
}

// ---- the scan ----

template <class T>
T* carve_index(std::byte*& memory, int64_t count) {
  T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  memory = reinterpret_cast<std::byte*>(p + count);
  return p;
}

template <class T>
IndexQuery prepare(const void* q, int32_t group, int32_t head_dim, float scale, float soft_cap, std::byte* memory) {
  constexpr float kLog2E = 1.44269504088896f;
  IndexQuery query{};
  query.group = group;
  query.chunks = index_chunks(head_dim);
  query.soft_cap = soft_cap;
  const int64_t count = int64_t{group} * query.chunks;
  query.codes = carve_index<int8_t>(memory, count * kIndexDims);
  query.bias = carve_index<int32_t>(memory, count);
  query.factor = carve_index<float>(memory, count);
  query.error = carve_index<float>(memory, count);
  query.largest = carve_index<float>(memory, count);
  query.finite = true;
  for (int64_t n = 0; n < count; ++n) {
    const int begin = static_cast<int>(n % query.chunks) * kIndexDims;
    const T* row = static_cast<const T*>(q) + n / query.chunks * head_dim + begin;
    const int dims = head_dim - begin < kIndexDims ? head_dim - begin : kIndexDims;
    float x[kIndexDims] = {};
    for (int i = 0; i < dims; ++i) x[i] = to_float(row[i]);
    float largest = 0.0f;
    float squares = 0.0f;
    for (int i = 0; i < kIndexDims; ++i) {
      const float magnitude = __builtin_fabsf(x[i]);
      largest = magnitude > largest || magnitude != magnitude ? magnitude : largest;
      squares += x[i] * x[i];
    }
    if (!(squares < kInfinity)) query.finite = false;
    const float step = largest / 127.0f;
    const float inverse = query.finite && step > 0.0f ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    int32_t magnitudes = 0;
    for (int i = 0; i < kIndexDims; ++i) {
      const float shifted = x[i] * inverse + 12582912.0f;
      const auto code = inverse > 0.0f && inverse < kInfinity ? static_cast<int8_t>(__builtin_bit_cast(uint32_t, shifted))
                                                             : int8_t{0};
      query.codes[n * kIndexDims + i] = code;
      sum += code;
      magnitudes += code < 0 ? -code : code;
    }
    query.bias[n] = -128 * sum;
    query.factor[n] = step * scale * (soft_cap > 0.0f ? 1.0f : kLog2E);
    query.largest[n] = static_cast<float>(magnitudes) * 127.0f * step * scale * kLog2E;
    // Rounding errors of K are uniform in +-1/2 of the key's scale; q's own meet keys of 127/2 scales, about.
    const float error = (squares + kIndexDims * (63.5f * step) * (63.5f * step)) * (1.0f / 12.0f);
    query.error[n] = __builtin_sqrtf(error) * scale * kLog2E;
  }
  return query;
}

constexpr int kIndexAhead = 4;  // groups: far enough to hide a DRAM access

struct Cursor {  // walks over the groups of a sequence's pages
  const ScanTask& task;
  int64_t group_bytes = index_group_bytes(task.head_dim);
  int page_groups = task.page_size / kIndexGroup;
  int last = (task.num_tokens - 1) / kIndexGroup;

  // Past the last token's group, that one again.
  const std::byte* at(int group) const {
    group = group < last ? group : last;
    return task.index + task.block_table[group / page_groups] * task.page_stride + group % page_groups * group_bytes;
  }
};

template <class Ops, int R, class Sink>
HYBRIDGEN_INLINE void estimate_rows(const std::byte* const* groups, const std::byte* const* next,
                                    const IndexQuery& query, int rows, int row, Sink&& sink) {
  if constexpr (R > 0) {
    if (rows == R) return Ops::template tile<R>(groups, next, query, row, sink);
    return estimate_rows<Ops, R - 1>(groups, next, query, rows, row, sink);
  }
}

// Calls sink(row, first, second) for every head.
template <class Ops, class Sink>
HYBRIDGEN_INLINE void estimate_unit(const std::byte* const* groups, const std::byte* const* next,
                                    const IndexQuery& query, int step, Sink&& sink) {
  for (int row = 0; row < query.group; row += step) {
    const int rows = query.group - row < step ? query.group - row : step;
    // Later passes find their keys in L1 and need not look ahead.
    estimate_rows<Ops, Ops::kRows>(groups, row == 0 ? next : groups, query, rows, row,
                                   [&](int r, FloatLanes first, FloatLanes second)
                                       __attribute__((always_inline)) { sink(row + r, first, second); });
  }
}

template <class Ops>
int rows_at_once(int group) {
  const int passes = (group + Ops::kRows - 1) / Ops::kRows;
  return (group + passes - 1) / passes;
}

template <class Ops>
HYBRIDGEN_INLINE FloatLanes cap(FloatLanes x, float soft_cap) {
  constexpr float kLog2E = 1.44269504088896f;
  // tanh(u) = sign(u) (1 - e) / (1 + e) with e = exp(-2 |u|)
  const FloatLanes magnitude = (FloatLanes)((BitLanes)x & 0x7fffffffu);
  const FloatLanes e = exp2_lanes<Ops>(magnitude * (-2.0f * kLog2E / soft_cap));
  const FloatLanes tanh = (1.0f - e) / (1.0f + e) * (soft_cap * kLog2E);
  const FloatLanes capped = (FloatLanes)((BitLanes)tanh | ((BitLanes)x & 0x80000000u));
  return magnitude < kInfinity ? capped : x - x;  // NaN stays NaN
}

// Copies of a unit's groups in which tokens past the last have a scale of zero: what lies there may be anything.
inline void copy_last(const ScanTask& task, int unit, const std::byte** groups, std::byte* memory) {
  const int64_t bytes = index_group_bytes(task.head_dim);
  const int chunks = task.query.chunks;
  for (int i = 0; i < 2; ++i) {
    std::byte* copy = memory + i * bytes;
    __builtin_memcpy(copy, groups[i], static_cast<size_t>(bytes));
    const int valid = task.num_tokens - unit * kIndexUnit - i * kIndexGroup;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      std::byte* scales = copy + (int64_t{chunks} * kIndexDims + chunk * 2) * kIndexGroup;
      for (int token = valid > 0 ? valid : 0; token < kIndexGroup; ++token) __builtin_memset(scales + token * 2, 0, 2);
    }
    groups[i] = copy;
  }
}

template <class Ops>
void estimate(const ScanTask& task, int32_t unit, float* out, std::byte* scratch) {
  const Cursor cursor{task};
  const std::byte* groups[2] = {cursor.at(unit * 2), cursor.at(unit * 2 + 1)};
  if ((unit + 1) * kIndexUnit > task.num_tokens) {
    copy_last(task, unit, groups, carve_index<std::byte>(scratch, 2 * index_group_bytes(task.head_dim)));
  }
  const float soft_cap = task.query.soft_cap;
  estimate_unit<Ops>(groups, groups, task.query, rows_at_once<Ops>(task.query.group),
                     [&](int row, FloatLanes first, FloatLanes second) __attribute__((always_inline)) {
                       store_lanes(out + row * kIndexUnit, soft_cap > 0.0f ? cap<Ops>(first, soft_cap) : first);
                       store_lanes(out + row * kIndexUnit + 16, soft_cap > 0.0f ? cap<Ops>(second, soft_cap) : second);
                     });
}

// The bits of the bfloat16 that is 2^(x - reference + kReferenceWeight), nearly: an integer plus a fraction is an exponent and a mantissa.
// 0.0574 centres the error of that.
template <class Ops>
HYBRIDGEN_INLINE HalfLanes weigh(FloatLanes first, FloatLanes second, float reference) {
  const FloatLanes offset = FloatLanes{} + ((127.0f + kReferenceWeight - 0.0574f - reference) * 128.0f + 0.5f);
  const FloatLanes bits = FloatLanes{} + 128.0f;
  const ShortLanes packed = Ops::pack(__builtin_convertvector(Ops::multiply_add(first, bits, offset), IntLanes),
                                     __builtin_convertvector(Ops::multiply_add(second, bits, offset), IntLanes));
  // 2^-87 at least: next to nothing, and subnormal numbers would be slow.
  const ShortLanes lowest = ShortLanes{} + static_cast<int16_t>(40 << 7);
  return (HalfLanes)(packed > lowest ? packed : lowest);
}

inline void widest_scales(const std::byte* const* groups, int chunks, uint16_t* largest) {
  for (int i = 0; i < 2; ++i) {
    const std::byte* scales = groups[i] + int64_t{chunks} * kIndexDims * kIndexGroup;
    for (int n = 0; n < chunks * kIndexGroup; n += kIndexGroup) {
      uint16_t bits[kIndexGroup];
      __builtin_memcpy(bits, scales + n * 2, sizeof(bits));
      for (int lane = 0; lane < kIndexGroup; ++lane) {
        largest[n + lane] = largest[n + lane] > bits[lane] ? largest[n + lane] : bits[lane];  // NaN is above all
      }
    }
  }
}

inline float widest_lane(const uint16_t* lanes) {
  Float16 largest{};
  for (int i = 0; i < kIndexGroup; ++i) largest.bits = largest.bits > lanes[i] ? largest.bits : lanes[i];
  return largest.bits < 0x7c00u ? to_float(largest) : kInfinity;
}

// row: [group, 32]
template <class Ops>
void find_reference(const ScanTask& task, float* row, std::byte* scratch) {
  estimate<Ops>(task, 0, row, scratch);
  const int num_first = task.num_tokens < kIndexUnit ? task.num_tokens : kIndexUnit;
  for (int r = 0; r < task.query.group; ++r) {
    float largest = -kInfinity;
    for (int i = 0; i < num_first; ++i) largest = row[r * kIndexUnit + i] > largest ? row[r * kIndexUnit + i] : largest;
    task.reference[r] = largest > -kInfinity ? largest : 0.0f;
  }
}

template <class Ops>
void scan(const ScanTask& task, std::byte* scratch) {
  const IndexQuery& query = task.query;
  const int group = query.group;
  const int chunks = query.chunks;
  const int step = rows_at_once<Ops>(group);
  float* row = carve_index<float>(scratch, int64_t{group} * kIndexUnit);
  float* sums = carve_index<float>(scratch, int64_t{group} * 16);
  uint16_t* scales = carve_index<uint16_t>(scratch, int64_t{2} * chunks * kIndexGroup);
  const Cursor cursor{task};

  find_reference<Ops>(task, row, scratch);

  const int num_units = (task.num_tokens + kIndexUnit - 1) / kIndexUnit;
  const int whole_units = task.num_tokens / kIndexUnit;
  const int sink_units = (task.num_sinks + kIndexUnit - 1) / kIndexUnit;
  for (int block = task.block_begin; block < task.block_end; ++block) {
    for (int i = 0; i < group * 16; ++i) sums[i] = 0.0f;
    for (int i = 0; i < 2 * chunks * kIndexGroup; ++i) scales[i] = 0;
    const int end = (block + 1) * kBlockUnits < num_units ? (block + 1) * kBlockUnits : num_units;
    uint16_t* weights = task.weights + int64_t{block} * kIndexBlock * group;
    const std::byte* ahead[kIndexAhead + 2];
    for (int i = 0; i < kIndexAhead; ++i) ahead[i] = cursor.at(block * kBlockUnits * 2 + i);
    for (int unit = block * kBlockUnits; unit < end; ++unit, weights += group * kIndexUnit) {
      ahead[kIndexAhead] = cursor.at(unit * 2 + kIndexAhead);
      ahead[kIndexAhead + 1] = cursor.at(unit * 2 + kIndexAhead + 1);
      const std::byte* groups[2] = {ahead[0], ahead[1]};
      const bool whole = unit < whole_units;
      if (!whole) copy_last(task, unit, groups, carve_index<std::byte>(scratch, 2 * index_group_bytes(task.head_dim)));
      const int valid = task.num_tokens - unit * kIndexUnit;
      estimate_unit<Ops>(groups, ahead + kIndexAhead, query, step,
                         [&](int r, FloatLanes first, FloatLanes second) __attribute__((always_inline)) {
                           if (query.soft_cap > 0.0f) {
                             first = cap<Ops>(first, query.soft_cap);
                             second = cap<Ops>(second, query.soft_cap);
                           }
                           HalfLanes bits = weigh<Ops>(first, second, task.reference[r]);
                           if (!whole) bits = keep_first(bits, valid);
                           store_lanes(weights + r * kIndexUnit, bits);
                           // The odd ones keep what lies below their mantissa: at most 2^-7 of them, 2^-9 on average.
                           FloatLanes sum = load_lanes<FloatLanes>(sums + r * 16);
                           sum += (FloatLanes)((BitLanes)bits << 16);
                           sum += (FloatLanes)bits;
                           store_lanes(sums + r * 16, sum);
                         });
      widest_scales(groups, chunks, unit < sink_units ? scales + chunks * kIndexGroup : scales);
#pragma GCC unroll 8
      for (int i = 0; i < kIndexAhead; ++i) ahead[i] = ahead[i + 2];
    }
    for (int r = 0; r < group; ++r) {
      task.sum[int64_t{r} * task.num_blocks + block] = sum_lanes(load_lanes<FloatLanes>(sums + r * 16));
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const float scale = widest_lane(scales + chunk * kIndexGroup);
      const float sink = widest_lane(scales + (chunks + chunk) * kIndexGroup);
      task.scale[int64_t{chunk} * task.num_blocks + block] = scale;
      task.scale[int64_t{chunks + chunk} * task.num_blocks + block] = scale > sink ? scale : sink;
    }
  }
}

// ---- selection ----

template <class Ops>
void score(const ScoreTask& task, std::byte* scratch) {
  uint32_t* histograms = carve_index<uint32_t>(scratch, 4 * kBins);  // four: the same bin twice in a row would wait
  for (int block = task.block_begin; block < task.block_end; ++block) {
    for (int i = 0; i < 4 * kBins; ++i) histograms[i] = 0;
    const int left = task.num_tokens - block * kIndexBlock;
    const int num = left < kIndexBlock ? left : kIndexBlock;
    const uint16_t* weights = task.weights + int64_t{block} * kIndexBlock * task.group;
    uint16_t* keys = task.keys + int64_t{block} * kIndexBlock;
    for (int begin = 0; begin < num; begin += kIndexUnit, keys += kIndexUnit) {
      FloatLanes even = {};
      FloatLanes odd = {};
      for (int row = 0; row < task.group; ++row, weights += kIndexUnit) {
        const BitLanes pairs = load_lanes<BitLanes>(weights);
        const FloatLanes factor = FloatLanes{} + task.factor[row];
        even = Ops::multiply_add((FloatLanes)(pairs << 16), factor, even);
        odd = Ops::multiply_add((FloatLanes)(pairs & 0xffff0000u), factor, odd);
      }
      HalfLanes unit = (HalfLanes)((BitLanes)even >> 16 | ((BitLanes)odd & 0xffff0000u));
      const int first = block * kIndexBlock + begin;
      const int valid = task.num_tokens - first;
      if (first < task.num_sinks || first + kIndexUnit > task.always_begin || valid < kIndexUnit) {
        unit |= ~keep_first(HalfLanes{} - 1, task.always_begin - first) | keep_first(HalfLanes{} - 1, task.num_sinks - first);
        unit = keep_first(unit, valid);
      }
      store_lanes(keys, unit);
      HalfLanes bins = unit > static_cast<uint16_t>(kLowestKey) ? unit : HalfLanes{} + static_cast<uint16_t>(kLowestKey);
      bins = (bins >> kKeyShift) - static_cast<uint16_t>(kLowestKey >> kKeyShift);
      bins = bins < static_cast<uint16_t>(kAlwaysBin) ? bins : HalfLanes{} + static_cast<uint16_t>(kAlwaysBin);
      uint64_t fours[8];
      store_lanes(fours, bins);
#pragma GCC unroll 8
      for (const uint64_t four : fours) {
        ++histograms[four & 0xffffu];
        ++histograms[kBins + (four >> 16 & 0xffffu)];
        ++histograms[2 * kBins + (four >> 32 & 0xffffu)];
        ++histograms[3 * kBins + (four >> 48)];
      }
    }
    uint32_t* histogram = task.histogram + int64_t{block} * kBins;
    for (int i = 0; i < kBins; i += 16) {
      BitLanes sum = load_lanes<BitLanes>(histograms + i);
      for (int n = 1; n < 4; ++n) sum += load_lanes<BitLanes>(histograms + n * kBins + i);
      store_lanes(histogram + i, sum);
    }
    histogram[0] -= static_cast<uint32_t>((kIndexUnit - num % kIndexUnit) % kIndexUnit);  // past the last token
  }
}

template <class Ops>
int32_t pick(const PickTask& task, std::byte* scratch) {
  float* sums = carve_index<float>(scratch, int64_t{task.group} * 16);
  const HalfLanes low = HalfLanes{} + static_cast<uint16_t>(task.low);
  int32_t count = 0;
  for (int block = task.block_begin; block < task.block_end; ++block) {
    const int left = task.num_tokens - block * kIndexBlock;
    const int num = left < kIndexBlock ? left : kIndexBlock;
    const uint16_t* keys = task.keys + int64_t{block} * kIndexBlock;
    const uint16_t* weights = task.weights + int64_t{block} * kIndexBlock * task.group;
    for (int i = 0; i < task.group * 16; ++i) sums[i] = 0.0f;
    for (int begin = 0; begin < num; begin += kIndexUnit, keys += kIndexUnit) {
      const HalfLanes unit = load_lanes<HalfLanes>(keys);
      const BitLanes below = (BitLanes)(unit < low);
      for (int row = 0; row < task.group; ++row, weights += kIndexUnit) {
        const BitLanes pairs = load_lanes<BitLanes>(weights) & below;
        FloatLanes sum = load_lanes<FloatLanes>(sums + row * 16);
        sum += (FloatLanes)(pairs << 16);
        sum += (FloatLanes)(pairs & 0xffff0000u);
        store_lanes(sums + row * 16, sum);
      }
      const BitLanes first = first_half(unit);
      const BitLanes second = second_half(unit);
      const IntLanes ids = kLaneIds + (block * kIndexBlock + begin);
      const int valid = num - begin;
      count += Ops::compress(task.tokens + count, ids,
                             (first >= task.low) & (first < task.high) & (kLaneIds < valid));
      count += Ops::compress(task.tokens + count, ids + 16,
                             (second >= task.low) & (second < task.high) & (kLaneIds < valid - 16));
    }
    for (int row = 0; row < task.group; ++row) {
      task.rest[int64_t{row} * task.num_blocks + block] = sum_lanes(load_lanes<FloatLanes>(sums + row * 16));
    }
  }
  return count;
}

template <class Ops>
void verify(const VerifyTask& task, std::byte* scratch) {
  const ScanTask& scan = task.scan;
  const IndexQuery& query = scan.query;
  const int group = query.group;
  float* row = carve_index<float>(scratch, int64_t{group} * kIndexUnit);
  float* sums = carve_index<float>(scratch, int64_t{group} * 32);
  const Cursor cursor{scan};
  find_reference<Ops>(scan, row, scratch);
  const HalfLanes low = HalfLanes{} + static_cast<uint16_t>(task.low);
  const int num_units = (scan.num_tokens + kIndexUnit - 1) / kIndexUnit;
  for (int block = scan.block_begin; block < scan.block_end; ++block) {
    for (int i = 0; i < group * 32; ++i) sums[i] = 0.0f;
    const int end = (block + 1) * kBlockUnits < num_units ? (block + 1) * kBlockUnits : num_units;
    for (int unit = block * kBlockUnits; unit < end; unit += kVerifyStride) {
      const std::byte* groups[2] = {cursor.at(unit * 2), cursor.at(unit * 2 + 1)};
      const std::byte* next[2] = {cursor.at((unit + kVerifyStride) * 2), cursor.at((unit + kVerifyStride) * 2 + 1)};
      const int valid = scan.num_tokens - unit * kIndexUnit;
      if (valid < kIndexUnit) {
        copy_last(scan, unit, groups, carve_index<std::byte>(scratch, 2 * index_group_bytes(scan.head_dim)));
      }
      const uint16_t* weights = task.weights + int64_t{unit} * group * kIndexUnit;
      const BitLanes below = (BitLanes)keep_first(
          (HalfLanes)(load_lanes<HalfLanes>(task.keys + int64_t{unit} * kIndexUnit) < low), valid);
      estimate_unit<Ops>(groups, next, query, rows_at_once<Ops>(group),
                         [&](int r, FloatLanes first, FloatLanes second) __attribute__((always_inline)) {
                           if (query.soft_cap > 0.0f) {
                             first = cap<Ops>(first, query.soft_cap);
                             second = cap<Ops>(second, query.soft_cap);
                           }
                           const BitLanes then = load_lanes<BitLanes>(weights + r * kIndexUnit) & below;
                           const BitLanes now = (BitLanes)weigh<Ops>(first, second, scan.reference[r]) & below;
                           const auto add = [](float* sum, BitLanes pairs) __attribute__((always_inline)) {
                             FloatLanes lanes = load_lanes<FloatLanes>(sum);
                             lanes += (FloatLanes)(pairs << 16);
                             lanes += (FloatLanes)(pairs & 0xffff0000u);
                             store_lanes(sum, lanes);
                           };
                           add(sums + r * 32, then);
                           add(sums + r * 32 + 16, now);
                         });
    }
    for (int r = 0; r < group; ++r) {
      const int64_t at = int64_t{r} * scan.num_blocks + block;
      task.before[at] = sum_lanes(load_lanes<FloatLanes>(sums + r * 32));
      task.now[at] = sum_lanes(load_lanes<FloatLanes>(sums + r * 32 + 16));
    }
  }
}

#undef HYBRIDGEN_INLINE
