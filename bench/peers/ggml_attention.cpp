// llama.cpp's attention: ggml_flash_attn_ext over an F16 cache laid out as llama.cpp lays it out. The protocol is
// bench/peers/protocol.py's.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

// Error over the output's length. The operator adds weighted values up in float16, which costs much in long contexts.
constexpr double kTolerance = 0.3;
// llama.cpp rounds the number of keys up, so that graphs can be reused.
constexpr int64_t kPaddedKeys = 256;

struct ContextDeleter {
  void operator()(ggml_context* context) const { ggml_free(context); }
};
struct BufferDeleter {
  void operator()(ggml_backend_buffer* buffer) const { ggml_backend_buffer_free(buffer); }
};
struct BackendDeleter {
  void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
};

struct Shape {
  int64_t kv_len, num_kv_heads, group, head_dim, num_layers;
};

class Attention {
 public:
  Attention(const Shape& shape, int num_threads) : shape_(shape), backend_(ggml_backend_cpu_init()) {
    ggml_backend_cpu_set_n_threads(backend_.get(), num_threads);
    const size_t tensors = 16 * static_cast<size_t>(shape.num_layers);
    context_.reset(ggml_init({ggml_tensor_overhead() * tensors + ggml_graph_overhead_custom(tensors, false), nullptr, true}));
    build(tensors);
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context_.get(), backend_.get()));
    if (!buffer_) {
      std::fprintf(stderr, "no memory for %lld layers\n", static_cast<long long>(shape.num_layers));
      std::exit(1);
    }
    fill();
    ggml_backend_graph_compute(backend_.get(), graph_);
    check();
  }

  double seconds_of_a_pass() {
    const auto begin = std::chrono::steady_clock::now();
    if (ggml_backend_graph_compute(backend_.get(), graph_) != GGML_STATUS_SUCCESS) std::exit(1);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

 private:
  void build(size_t tensors) {
    ggml_context* context = context_.get();
    graph_ = ggml_new_graph_custom(context, tensors, false);
    const int64_t padded = (shape_.kv_len + kPaddedKeys - 1) / kPaddedKeys * kPaddedKeys;
    mask_ = ggml_new_tensor_2d(context, GGML_TYPE_F16, padded, 1);
    q_ = ggml_new_tensor_3d(context, GGML_TYPE_F32, shape_.head_dim, 1, shape_.num_kv_heads * shape_.group);
    for (int64_t layer = 0; layer < shape_.num_layers; ++layer) {
      // A token's heads lie side by side, as in llama.cpp's cache; the operator sees them permuted.
      auto* k = ggml_new_tensor_3d(context, GGML_TYPE_F16, shape_.head_dim, shape_.num_kv_heads, padded);
      auto* v = ggml_new_tensor_3d(context, GGML_TYPE_F16, shape_.head_dim, shape_.num_kv_heads, padded);
      k_.push_back(k);
      v_.push_back(v);
      auto* out = ggml_flash_attn_ext(context, q_, ggml_permute(context, k, 0, 2, 1, 3), ggml_permute(context, v, 0, 2, 1, 3),
                                      mask_, scale(), 0.0f, 0.0f);
      outputs_.push_back(out);
      ggml_build_forward_expand(graph_, out);
    }
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }

  void fill() {
    std::mt19937 random(0);
    std::normal_distribution<float> normal;
    std::vector<ggml_fp16_t> noise(1 << 20);
    for (auto& value : noise) value = ggml_fp32_to_fp16(normal(random));
    for (auto* list : {&k_, &v_}) {
      for (auto* tensor : *list) {
        const size_t bytes = ggml_nbytes(tensor), step = noise.size() * sizeof(ggml_fp16_t);
        for (size_t begin = 0; begin < bytes; begin += step) {
          std::memcpy(static_cast<char*>(tensor->data) + begin, noise.data(), std::min(step, bytes - begin));
        }
      }
    }
    auto* q = static_cast<float*>(q_->data);
    for (int64_t i = 0; i < ggml_nelements(q_); ++i) q[i] = normal(random);
    auto* mask = static_cast<ggml_fp16_t*>(mask_->data);
    for (int64_t i = 0; i < ggml_nelements(mask_); ++i) mask[i] = ggml_fp32_to_fp16(i < shape_.kv_len ? 0.0f : -INFINITY);
  }

  // The last head of the last layer against float64, so that a figure cannot come from the wrong computation.
  void check() const {
    const int64_t d = shape_.head_dim, head = shape_.num_kv_heads * shape_.group - 1, kv_head = shape_.num_kv_heads - 1;
    const auto* q = static_cast<const float*>(q_->data) + head * d;
    const auto row = [&](const ggml_tensor* tensor, int64_t token) {
      return static_cast<const ggml_fp16_t*>(tensor->data) + (token * shape_.num_kv_heads + kv_head) * d;
    };
    std::vector<double> logits(shape_.kv_len), expected(d, 0.0);
    double highest = -INFINITY, sum = 0.0;
    for (int64_t token = 0; token < shape_.kv_len; ++token) {
      double dot = 0.0;
      for (int64_t i = 0; i < d; ++i) dot += q[i] * ggml_fp16_to_fp32(row(k_.back(), token)[i]);
      logits[token] = dot * scale();
      highest = std::max(highest, logits[token]);
    }
    for (int64_t token = 0; token < shape_.kv_len; ++token) {
      const double weight = std::exp(logits[token] - highest);
      sum += weight;
      for (int64_t i = 0; i < d; ++i) expected[i] += weight * ggml_fp16_to_fp32(row(v_.back(), token)[i]);
    }
    const auto* out = static_cast<const float*>(outputs_.back()->data) + head * d;
    double error = 0.0, length = 0.0;
    for (int64_t i = 0; i < d; ++i) {
      const double value = expected[i] / sum;
      error += (out[i] - value) * (out[i] - value);
      length += value * value;
    }
    std::fprintf(stderr, "%lld tokens: relative error %.3g\n", static_cast<long long>(shape_.kv_len), std::sqrt(error / length));
    if (!(error <= kTolerance * kTolerance * length)) std::exit(1);
  }

  Shape shape_;
  std::unique_ptr<ggml_backend, BackendDeleter> backend_;
  std::unique_ptr<ggml_context, ContextDeleter> context_;
  std::unique_ptr<ggml_backend_buffer, BufferDeleter> buffer_;
  ggml_cgraph* graph_ = nullptr;
  ggml_tensor* q_ = nullptr;
  ggml_tensor* mask_ = nullptr;
  std::vector<ggml_tensor*> k_, v_, outputs_;
};

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("ggml %s (F16)\n", ggml_version());
  std::fflush(stdout);
  std::unique_ptr<Attention> attention;
  char line[256];
  while (std::fgets(line, sizeof line, stdin)) {
    Shape shape;
    double seconds;
    if (std::sscanf(line, "prepare %lld %lld %lld %lld %lld", reinterpret_cast<long long*>(&shape.kv_len),
                    reinterpret_cast<long long*>(&shape.num_kv_heads), reinterpret_cast<long long*>(&shape.group),
                    reinterpret_cast<long long*>(&shape.head_dim), reinterpret_cast<long long*>(&shape.num_layers)) == 5) {
      attention.reset();
      attention = std::make_unique<Attention>(shape, num_threads);
      std::printf("ready\n");
    } else if (attention && std::sscanf(line, "measure %lf", &seconds) == 1) {
      double best = INFINITY, spent = 0.0;
      int passes = 0;
      while (passes < 2 || spent < seconds) {
        const double took = attention->seconds_of_a_pass();
        best = std::min(best, took);
        spent += took;
        ++passes;
      }
      std::printf("%.9f %d\n", best, passes);
    } else {
      std::fprintf(stderr, "not understood: %s", line);
      return 2;
    }
    std::fflush(stdout);
  }
}
