// AVX-512 pieces that more than one path is made of. Included inside an anonymous namespace.

constexpr float kLog2E = 1.44269504088896f;

// 2^x, by a polynomial in x - round(x) and an exponent shift. Relative error at most 3e-7 with kDegree 6 and 3e-6
// with kDegree 4 (minimax coefficients for |x| <= 1/2). Far below the smallest float gives 0.
template <int kDegree>
inline __m512 exp2_avx512(__m512 x) {
  static_assert(kDegree == 4 || kDegree == 6);
  // -inf - round(-inf) would be NaN. A NaN stays one: the second operand wins.
  x = _mm512_max_ps(_mm512_set1_ps(-1000.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p;
  if constexpr (kDegree == 6) {
    p = _mm512_set1_ps(0.00015345812f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0013399931f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.009618489f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.055503286f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24022646f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931472f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  } else {
    p = _mm512_set1_ps(0.009570101f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05591786f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24024744f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6931218f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999993f));
  }
  return _mm512_scalef_ps(p, n);
}

// Calls fn(offset, mask) for the vectors of 16 that [begin, end) touches, in order.
template <class Fn>
inline void for_masked(int begin, int end, Fn&& fn) {
  if (end <= begin) return;
  const int first = begin / 16;
  const int last = (end - 1) / 16;
  const unsigned head = 0xffffu << (begin - first * 16) & 0xffffu;
  const unsigned tail = 0xffffu >> (15 - (end - 1 - last * 16));
  if (first == last) return fn(first * 16, static_cast<__mmask16>(head & tail));
  fn(first * 16, static_cast<__mmask16>(head));
  for (int i = first + 1; i < last; ++i) fn(i * 16, static_cast<__mmask16>(0xffff));
  fn(last * 16, static_cast<__mmask16>(tail));
}

// A row of dot products to a row of softmax weights, written through `store(offset, weights)`; zero outside
// [begin, end). `maximum` is in units of log 2. What lies outside may be NaN: it is masked, never multiplied.
template <int kDegree, class Store>
inline void softmax_avx512(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                           float& sum, Store&& store) {
  float factor = scale * kLog2E;
  if (soft_cap > 0.0f) {
    // tanh(u) = 1 - 2 / (1 + exp(2u)); from |u| = 40 it is 1 in float32.
    const __m512 inner = _mm512_set1_ps(2.0f * kLog2E * scale / soft_cap);
    const __m512 one = _mm512_set1_ps(1.0f);
    for_masked(begin, end, [&](int i, __mmask16) {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + i), inner);
      x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(120.0f)), _mm512_set1_ps(-120.0f));
      const __m512 e = exp2_avx512<6>(x);
      // (e - 1) / (e + 1) keeps its relative precision near zero better than 1 - 2 / (e + 1).
      const __m512 tanh = _mm512_div_ps(_mm512_sub_ps(e, one), _mm512_add_ps(e, one));
      _mm512_storeu_ps(scores + i, _mm512_mul_ps(tanh, _mm512_set1_ps(soft_cap)));
    });
    factor = kLog2E;
  }
  __m512 largest = _mm512_set1_ps(-__builtin_inff());
  for_masked(begin, end, [&](int i, __mmask16 mask) {
    largest = _mm512_mask_max_ps(largest, mask, largest, _mm512_loadu_ps(scores + i));
  });
  maximum = _mm512_reduce_max_ps(largest) * factor;

  const __m512 factors = _mm512_set1_ps(factor);
  const __m512 shift = _mm512_set1_ps(maximum);
  __m512 sums = _mm512_setzero_ps();
  const int first = end > begin ? begin / 16 * 16 : 0;
  const int after = end > begin ? (end + 15) / 16 * 16 : 0;
  for (int i = 0; i < first; i += 16) store(i, _mm512_setzero_ps());
  for_masked(begin, end, [&](int i, __mmask16 mask) {
    const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factors, shift);
    const __m512 weights = _mm512_maskz_mov_ps(mask, exp2_avx512<kDegree>(x));
    sums = _mm512_add_ps(sums, weights);
    store(i, weights);
  });
  for (int i = after; i < num; i += 16) store(i, _mm512_setzero_ps());
  sum = _mm512_reduce_add_ps(sums);
}

inline __mmask16 first_lanes(int num) { return static_cast<__mmask16>(0xffffu >> (16 - num)); }

// Brings the same four 32-bit words of 16 rows together: lane L of vector i has those of row 4i + L, for i < 4. Calls
// emit(word, i, words) for word = 0, 4, .. below num_words; past the end of a row there are zeros. Rows are read one
// after another, whole lines at a time: the hardware's prefetchers know no other pattern.
template <class Row, class Emit>
inline __attribute__((always_inline)) void gather_words(Row&& row, int num_words, Emit&& emit) {
  const int whole = num_words / 16 * 16;
  for (int i = 0; i < 4; ++i) {
    const auto* a = reinterpret_cast<const int*>(row(4 * i));
    const auto* b = reinterpret_cast<const int*>(row(4 * i + 1));
    const auto* c = reinterpret_cast<const int*>(row(4 * i + 2));
    const auto* d = reinterpret_cast<const int*>(row(4 * i + 3));
    auto transpose = [&](int word, int end, __m512i va, __m512i vb, __m512i vc, __m512i vd) __attribute__((always_inline)) {
      const __m512i ab_low = _mm512_shuffle_i32x4(va, vb, 0b01000100);   // a0 a1 b0 b1
      const __m512i ab_high = _mm512_shuffle_i32x4(va, vb, 0b11101110);  // a2 a3 b2 b3
      const __m512i cd_low = _mm512_shuffle_i32x4(vc, vd, 0b01000100);
      const __m512i cd_high = _mm512_shuffle_i32x4(vc, vd, 0b11101110);
      emit(word, i, _mm512_shuffle_i32x4(ab_low, cd_low, 0b10001000));
      if (word + 4 < end) emit(word + 4, i, _mm512_shuffle_i32x4(ab_low, cd_low, 0b11011101));
      if (word + 8 < end) emit(word + 8, i, _mm512_shuffle_i32x4(ab_high, cd_high, 0b10001000));
      if (word + 12 < end) emit(word + 12, i, _mm512_shuffle_i32x4(ab_high, cd_high, 0b11011101));
    };
    int word = 0;
    for (; word + 32 <= whole; word += 32) {
      const __m512i lines[8] = {
          _mm512_loadu_si512(a + word), _mm512_loadu_si512(a + word + 16), _mm512_loadu_si512(b + word),
          _mm512_loadu_si512(b + word + 16), _mm512_loadu_si512(c + word), _mm512_loadu_si512(c + word + 16),
          _mm512_loadu_si512(d + word), _mm512_loadu_si512(d + word + 16)};
      asm volatile("" ::: "memory");  // in this order
      transpose(word, word + 16, lines[0], lines[2], lines[4], lines[6]);
      transpose(word + 16, word + 32, lines[1], lines[3], lines[5], lines[7]);
    }
    for (; word < whole; word += 16) {
      transpose(word, word + 16, _mm512_loadu_si512(a + word), _mm512_loadu_si512(b + word),
                _mm512_loadu_si512(c + word), _mm512_loadu_si512(d + word));
    }
    if (whole < num_words) {
      const auto tail = static_cast<__mmask16>(0xffffu >> (16 - (num_words - whole)));
      transpose(whole, num_words, _mm512_maskz_loadu_epi32(tail, a + whole), _mm512_maskz_loadu_epi32(tail, b + whole),
                _mm512_maskz_loadu_epi32(tail, c + whole), _mm512_maskz_loadu_epi32(tail, d + whole));
    }
  }
}

// Sums of the four words in each lane, for four vectors: word 4i + L is the sum of lane L of the i-th vector.
inline __m512 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0b01000100), _mm512_shuffle_ps(ab, cd, 0b11101110));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(order, sums);
}

struct Avx512Base {
  static constexpr bool kTiles = false;
  static constexpr int kScoreRows = 6;  // 24 accumulators, 4 vectors of pairs and a broadcast fill the 32 registers
  static constexpr int kRows = 6;
  static constexpr int kVectors = 4;
  // Not to L1: that shares its few miss buffers with the loads, and streaming gets half as fast.
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T2); }
};
