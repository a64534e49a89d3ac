// bfloat16 attention by tiles of 16 rows x 64 bytes. Included inside an anonymous namespace after something has
// defined `Tiles`: the instructions, or their model in software.
//
// Scores: a tile holds 32 dims of 16 keys as they lie in their pages, the other one the same dims of 16 query rows in
// pairs; the product is 16 keys x 16 rows and is turned on its way to the rows of scores. Values: a tile holds 32
// weights of 16 rows, the other one the token pairs of 16 dims. What is multiplied does not depend on how many rows
// there are, so neither does a row's result.

struct AmxOps : Avx512Base {
  using Element = BFloat16;
  using Query = BFloat16;
  using Packed = BFloat16;
  static constexpr bool kTiles = true;
  static constexpr int kVectorPairs = 16;

  static constexpr int padded(int head_dim) { return (head_dim + 31) / 32 * 32; }

  template <class Row>
  static void pack_keys(Row&& row, int head_dim, Packed* packed) {  // [16][padded head_dim]
    const int stride = padded(head_dim);
    for (int j = 0; j < kGroupTokens; ++j) {
      const Element* k = row(j);
      for (int dim = 0; dim < stride; dim += 32) {
        const int num = min_int(32, head_dim - dim);
        const auto mask = static_cast<__mmask32>(0xffffffffu >> (32 - num));
        _mm512_storeu_si512(packed + j * stride + dim, _mm512_maskz_loadu_epi16(mask, k + dim));
      }
    }
  }
  // [rows / 16][padded head_dim / 2][16][2], each 16 rows at the place of the first of them.
  static void pack(const Element* row, int head_dim, Query* queries, int r) {
    Query* tile = queries + static_cast<int64_t>(r / 16 * 16) * kQueryStride<Query> + r % 16 * 2;
    for (int i = 0; i < padded(head_dim); ++i) {
      tile[i / 2 * 32 + i % 2] = row != nullptr && i < head_dim ? row[i] : BFloat16{0};
    }
  }

  static void score_rows(const Query* q, const Packed* packed, int num_keys, int rows, int head_dim, float* scores) {
    alignas(64) float product[16 * 16];
    const int stride = padded(head_dim);
    for (int row = 0; row < rows; row += 16) {
      const Query* queries = q + static_cast<int64_t>(row) * kQueryStride<Query>;
      for (int key = 0; key < num_keys; key += kGroupTokens) {
        const Packed* keys = packed + static_cast<int64_t>(key) * stride;
        Tiles::zero<0>();
        for (int dim = 0; dim < stride; dim += 32) {
          Tiles::load<1>(keys + dim, stride * 2);
          Tiles::load<2>(queries + dim * 16, 64);
          Tiles::multiply_add<0, 1, 2>();
        }
        Tiles::store<0>(product, 64);
        turn(product, min_int(16, rows - row), scores + static_cast<int64_t>(row) * (kScoreRowBytes / 4) + key);
      }
    }
  }

  // [16 keys][16 rows] to `rows` rows of scores.
  static void turn(const float* product, int rows, float* scores) {
    const __m512i keys = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    for (int r = 0; r < rows; ++r) {
      _mm512_storeu_ps(scores + r * (kScoreRowBytes / 4), _mm512_i32gather_ps(keys, product + r, 4));
    }
  }

  // [head_dim][2]
  static void pack_values(const Element* even, const Element* odd, int head_dim, Packed* packed) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int dim = 0; dim < head_dim; dim += 16) {
      const __mmask16 mask = first_lanes(min_int(16, head_dim - dim));
      const __m512i low = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, even + dim));
      const __m512i both = _mm512_inserti64x4(low, _mm256_maskz_loadu_epi16(mask, odd + dim), 1);
      _mm512_storeu_si512(packed + dim * 2, _mm512_permutexvar_epi16(order, both));
    }
  }

  static void value_rows(const Query* weights, Packed* packed, int num_pairs, int rows, int head_dim, bool fresh,
                         float* out) {
    constexpr int kWeightStride = kScoreRowBytes / static_cast<int>(sizeof(Query));
    const int stride = value_stride(head_dim);
    // Half a tile at the end is filled up: zeros here, and zero weights by softmax.
    for (int pair = num_pairs; pair % 16 != 0; ++pair) {
      for (int i = 0; i < stride; ++i) packed[static_cast<int64_t>(pair) * stride + i] = BFloat16{0};
    }
    alignas(64) float sums[16 * 16];
    for (int row = 0; row < rows; row += 16) {
      const int num_rows = min_int(16, rows - row);
      for (int dim = 0; dim < head_dim; dim += 16) {
        const __mmask16 mask = first_lanes(min_int(16, head_dim - dim));
        float* place = out + static_cast<int64_t>(row) * head_dim + dim;
        for (int r = 0; r < 16; ++r) {
          const __m512 before = !fresh && r < num_rows
                                    ? _mm512_maskz_loadu_ps(mask, place + static_cast<int64_t>(r) * head_dim)
                                    : _mm512_setzero_ps();
          _mm512_store_ps(sums + r * 16, before);
        }
        Tiles::load<0>(sums, 64);
        for (int pair = 0; pair < num_pairs; pair += 16) {
          Tiles::load<1>(weights + static_cast<int64_t>(row) * kWeightStride + pair * 2, kScoreRowBytes);
          Tiles::load<2>(packed + static_cast<int64_t>(pair) * stride + dim * 2, stride * 2);
          Tiles::multiply_add<0, 1, 2>();
        }
        Tiles::store<0>(sums, 64);
        for (int r = 0; r < num_rows; ++r) {
          _mm512_mask_storeu_ps(place + static_cast<int64_t>(r) * head_dim, mask, _mm512_load_ps(sums + r * 16));
        }
      }
    }
  }

  static void softmax(float* scores, int begin, int end, int num, float scale, float soft_cap, float& maximum,
                      float& sum) {
    // In place: a vector of weights ends before the next vector of scores begins.
    auto* weights_row = reinterpret_cast<char*>(scores);
    softmax_avx512<4>(scores, begin, end, num, scale, soft_cap, maximum, sum, [&](int i, __m512 weights) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(weights);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_row + i * 2), rounded);
    });
    if (num % 32 != 0) _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights_row + num * 2), _mm256_setzero_si256());
  }
};

void attend_tiles(const AttendTask& task, std::byte* scratch) {
  Tiles::configure();
  attend<AmxOps>(task, scratch);
  Tiles::release();
}

void score_tiles(const AttendTask& task, std::byte* scratch) {
  Tiles::configure();
  score<AmxOps>(task, scratch);
  Tiles::release();
}
