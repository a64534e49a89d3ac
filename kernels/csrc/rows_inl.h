// Row-wise operations between the linear layers, the algorithm once: plain loops that the compiler turns into each
// ISA's vectors. Sums run in 16 lanes added in a fixed order, so every ISA gives the same bits.

constexpr int kLanes = 16;

// exp(x) to 2e-7 relative; saturates instead of overflowing. Free of branches, so that it becomes vectors.
inline float exp_row(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float scaled = x * 1.44269504088896f;
  const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, kept in the low bits
  const float shifted = scaled + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (__builtin_bit_cast(uint32_t, shifted) + 127u) << 23;
  return p * __builtin_bit_cast(float, exponent);
}

// out = round(x / rms(x)) * weight, as Hugging Face rounds it: once after normalising, once after the weight.
// With a residual, x is added to it first, in place, and the rounded sum is normalised.
template <class T>
void rms_norm(const RowsTask& task, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(task.weight);
  const int64_t n = task.n;
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(task.x) + row * task.x_stride;
    if (task.residual != nullptr) {
      T* residual = static_cast<T*>(task.residual) + row * task.residual_stride;
      for (int64_t i = 0; i < n; ++i) residual[i] = from_float<T>(to_float(residual[i]) + to_float(x[i]));
      x = residual;
    }
    float sums[kLanes] = {};
    for (int64_t i = 0; i < whole; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float value = to_float(x[i + lane]);
        sums[lane] += value * value;
      }
    }
    float sum = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    for (int64_t i = whole; i < n; ++i) sum += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + task.eps);
    T* out = static_cast<T*>(task.out) + row * task.out_stride;
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_float<T>(to_float(from_float<T>(to_float(x[i]) * scale)) * to_float(weight[i]));
    }
  }
}

// Rotates the halves of the first 2n dims of every head, in place: (a, b) -> (a cos - b sin, b cos + a sin).
template <class T>
void rotary(const RowsTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.n;
  for (int64_t row = begin; row < end; ++row) {
    const float* cos = task.cos + row * n;
    const float* sin = task.sin + row * n;
    for (int which = 0; which < 2; ++which) {
      T* heads = static_cast<T*>(task.heads[which]) + row * task.heads_stride[which];
      for (int head = 0; head < task.num_heads[which]; ++head) {
        T* a = heads + static_cast<int64_t>(head) * task.head_dim;
        T* b = a + n;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
          const float x = to_float(a[i]);
          const float y = to_float(b[i]);
          a[i] = from_float<T>(x * cos[i] - y * sin[i]);
          b[i] = from_float<T>(y * cos[i] + x * sin[i]);
        }
      }
    }
  }
}

// out = silu(gate) * up, where x = [gate, up]; rounded once after silu and once after the product.
template <class T>
void silu_and_mul(const RowsTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.n;
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(task.x) + row * task.x_stride;
    const T* up = gate + n;
    T* out = static_cast<T*>(task.out) + row * task.out_stride;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const float x = to_float(gate[i]);
      const float silu = to_float(from_float<T>(x / (1.0f + exp_row(-x))));
      out[i] = from_float<T>(silu * to_float(up[i]));
    }
  }
}

// Two partial attentions over disjoint keys into one: out = (a e^(lse_a - L) + b e^(lse_b - L)), L = log(e^lse_a + e^lse_b).
template <class T>
void merge(const RowsTask& task, int64_t begin, int64_t end) {
  const int64_t n = task.n;
  for (int64_t row = begin; row < end; ++row) {
    const float lse_a = task.part_lse[0][row];
    const float lse_b = task.part_lse[1][row];
    // The larger part weighs exactly 1. With both empty, or one infinite, the shift would give NaN: see reference.py.
    const float larger = lse_a > lse_b ? lse_a : lse_b;
    const float shift = larger - larger == 0.0f ? larger : 0.0f;
    const float weight_a = __builtin_expf(lse_a - shift);
    const float weight_b = __builtin_expf(lse_b - shift);
    const float total = weight_a + weight_b;
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    if (task.lse != nullptr) task.lse[row] = shift + __builtin_logf(total);
    const float* a = task.parts[0] + row * n;
    const float* b = task.parts[1] + row * n;
    T* out = static_cast<T*>(task.out) + row * n;
    for (int64_t i = 0; i < n; ++i) out[i] = from_float<T>(a[i] * (weight_a * inverse) + b[i] * (weight_b * inverse));
  }
}
