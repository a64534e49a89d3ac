#include "layer.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "buffers.h"

namespace hybridgen {
namespace {

constexpr int kBFloat16 = static_cast<int>(Dtype::bfloat16);
constexpr int64_t kElementBytes = 2;
constexpr int32_t kRowsPerItem = 32;
constexpr int64_t kAloneBytes = 512 << 10;
constexpr int64_t kLinearItemBytes = 128 << 10;
constexpr int64_t kLinearAloneBytes = 256 << 10;

// Memory of the calling thread that lasts until the next call.
std::byte* workspace(int64_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
  return reinterpret_cast<std::byte*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t{63});
}

}  // namespace

void run_rows(Pool* pool, RowsFn fn, const RowsTask& task, int64_t rows, int64_t row_bytes) {
  if (pool == nullptr || rows * row_bytes < kAloneBytes) return fn(task, 0, rows);
  struct Call {
    RowsFn fn;
    const RowsTask& task;
    int64_t rows;
  };
  const Call call{fn, task, rows};
  pool->run(
      static_cast<int32_t>((rows + kRowsPerItem - 1) / kRowsPerItem),
      [](const void* context, int32_t item, std::byte*) {
        const Call& c = *static_cast<const Call*>(context);
        const int64_t begin = int64_t{item} * kRowsPerItem;
        c.fn(c.task, begin, begin + kRowsPerItem < c.rows ? begin + kRowsPerItem : c.rows);
      },
      &call, 0, false);
}

void run_linear(Pool& pool, const LinearWeights& weights, const void* x, int64_t x_stride, void* out,
                int64_t out_stride, int64_t rows) {
  const LinearFn fn = pool.kernels().linear;
  if (fn == nullptr) throw std::invalid_argument("no such product on this instruction set");
  struct Call {
    LinearFn fn;
    LinearTask task;
    int64_t outputs;
    int64_t item_outputs;
  };
  // Long runs, since each begins slowly; but several for each thread, which may come late.
  const int64_t row_bytes = weights.inputs * kElementBytes;
  const int64_t even = weights.outputs / (3 * pool.num_threads());
  const int64_t per_item =
      (std::clamp(even, kLinearItemBytes / row_bytes, 8 * kLinearItemBytes / row_bytes) + 15) / 16 * 16;
  const Call call{
      fn, {x, x_stride, weights.weight, weights.bias, out, out_stride, rows, weights.inputs}, weights.outputs,
      per_item > 16 ? per_item : 16};
  pool.run(
      static_cast<int32_t>((weights.outputs + call.item_outputs - 1) / call.item_outputs),
      [](const void* context, int32_t item, std::byte*) {
        const Call& c = *static_cast<const Call*>(context);
        const int64_t begin = int64_t{item} * c.item_outputs;
        c.fn(c.task, begin, begin + c.item_outputs < c.outputs ? begin + c.item_outputs : c.outputs);
      },
      &call, 0, row_bytes * weights.outputs * (rows > 8 ? rows / 8 : 1) < kLinearAloneBytes);
}

Layer::Layer(const LayerWeights& weights) : weights_(weights), hidden_(weights.qkv.inputs) {
  const int64_t q_size = int64_t{weights.num_heads} * weights.head_dim;
  const int64_t kv_size = int64_t{weights.num_kv_heads} * weights.head_dim;
  if (weights.qkv.outputs != q_size + 2 * kv_size || weights.out.inputs != q_size || weights.out.outputs != hidden_ ||
      weights.up.inputs != hidden_ || weights.up.outputs != 2 * weights.down.inputs ||
      weights.down.outputs != hidden_ || (weights.q_norm == nullptr) != (weights.k_norm == nullptr)) {
    throw std::invalid_argument("the matrices of a layer do not go together");
  }
}

void Layer::norm(Pool& pool, int64_t rows, const void* x, void* residual, const void* weight, void* out) const {
  RowsTask task{};
  task.x = x;
  task.x_stride = hidden_;
  task.residual = residual;
  task.residual_stride = hidden_;
  task.weight = weight;
  task.out = out;
  task.out_stride = hidden_;
  task.n = hidden_;
  task.eps = weights_.eps;
  run_rows(&pool, pool.kernels().rms_norm[kBFloat16], task, rows, 2 * hidden_ * kElementBytes);
}

void Layer::enter(Pool& pool, int64_t rows, const std::byte* x, std::byte* residual, const float* cos,
                  const float* sin, int64_t half, std::byte* heads) const {
  const LayerWeights& w = weights_;
  std::byte* normed = workspace(rows * hidden_ * kElementBytes);
  if (x == nullptr) {
    norm(pool, rows, residual, nullptr, w.attention_norm, normed);
  } else {
    norm(pool, rows, x, residual, w.attention_norm, normed);
  }
  const int64_t row = w.qkv.outputs;
  run_linear(pool, w.qkv, normed, hidden_, heads, row, rows);

  const int64_t head_bytes = w.head_dim * kElementBytes;
  if (w.q_norm != nullptr) {
    RowsTask task{};
    task.n = w.head_dim;
    task.eps = w.eps;
    task.x_stride = task.out_stride = row;
    for (int32_t head = 0; head < w.num_heads + w.num_kv_heads; ++head) {
      task.x = task.out = heads + head * head_bytes;
      task.weight = head < w.num_heads ? w.q_norm : w.k_norm;
      run_rows(&pool, pool.kernels().rms_norm[kBFloat16], task, rows, 2 * head_bytes);
    }
  }
  if (half > 0) {
    RowsTask task{};
    task.heads[0] = heads;
    task.heads[1] = heads + w.num_heads * head_bytes;
    task.heads_stride[0] = task.heads_stride[1] = row;
    task.num_heads[0] = w.num_heads;
    task.num_heads[1] = w.num_kv_heads;
    task.head_dim = w.head_dim;
    task.cos = cos;
    task.sin = sin;
    task.n = half;
    run_rows(&pool, pool.kernels().rotary[kBFloat16], task, rows, (w.num_heads + w.num_kv_heads) * head_bytes);
  }
}

void Layer::leave(Pool& pool, int64_t rows, const std::byte* attended, std::byte* residual, std::byte* x) const {
  const LayerWeights& w = weights_;
  const int64_t intermediate = w.down.inputs;
  std::byte* normed = workspace(rows * (hidden_ + 3 * intermediate) * kElementBytes);
  std::byte* up = normed + rows * hidden_ * kElementBytes;
  std::byte* gated = up + rows * 2 * intermediate * kElementBytes;
  run_linear(pool, w.out, attended, w.out.inputs, x, hidden_, rows);
  norm(pool, rows, x, residual, w.mlp_norm, normed);
  run_linear(pool, w.up, normed, hidden_, up, 2 * intermediate, rows);
  RowsTask task{};
  task.x = up;
  task.x_stride = 2 * intermediate;
  task.out = gated;
  task.out_stride = intermediate;
  task.n = intermediate;
  run_rows(&pool, pool.kernels().silu_and_mul[kBFloat16], task, rows, 3 * intermediate * kElementBytes);
  run_linear(pool, w.down, gated, intermediate, x, hidden_, rows);
}

}  // namespace hybridgen
