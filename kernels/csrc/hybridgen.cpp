#include "hybridgen.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>

namespace hybridgen {
namespace {

constexpr float kLn2 = 0.693147180559945f;
constexpr int32_t kZero = 0;  // where every sequence begins

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

// As unsigned numbers in the order of the floats; NaN above all.
uint32_t key_of(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.0f);  // -0 becomes 0
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// The tokens of the k largest logits, ascending; of equal ones the first. 0 < k <= n.
void find_top_k(const float* logits, int32_t n, int32_t k, int32_t* tokens) {
  // The k-th largest key, eleven bits at a time.
  constexpr int32_t kShifts[] = {21, 10, 0};
  constexpr int32_t kBits[] = {11, 11, 10};
  uint32_t prefix = 0;
  int32_t left = k;  // of the keys that begin with `prefix`
  for (int32_t level = 0; level < 3; ++level) {
    const int32_t shift = kShifts[level];
    const int32_t above = shift + kBits[level];
    const uint32_t mask = (1u << kBits[level]) - 1;
    uint32_t counts[1 << 11] = {};
    for (int32_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(logits[i]);
      if (level == 0 || key >> above == prefix) ++counts[key >> shift & mask];
    }
    uint32_t digit = mask;
    while (counts[digit] < static_cast<uint32_t>(left)) left -= static_cast<int32_t>(counts[digit--]);
    prefix = prefix << kBits[level] | digit;
  }
  for (int32_t i = 0, num = 0; num < k; ++i) {
    const uint32_t key = key_of(logits[i]);
    if (key > prefix || (key == prefix && left-- > 0)) tokens[num++] = i;
  }
}

}  // namespace

HybridGenStep::HybridGenStep(const Step& step, double ratio, int32_t min_tokens, TopKRecord& record)
    : step_(step), record_(record), group_(step.num_heads_ / step.layout_.num_kv_heads) {
  const Layout& layout = step.layout_;
  const int64_t num_heads = step.num_heads_;
  const int32_t num_threads = step.pool_.num_threads();
  std::vector<char> scored(step.kv_len_.size());
  int64_t num_blocks = 0;
  const auto reserve = [&](int64_t bytes) {
    const int64_t begin = job_bytes_;
    job_bytes_ += (bytes + 63) / 64 * 64;
    return begin;
  };
  for (size_t seq = 0; seq < step.kv_len_.size(); ++seq) {
    const int32_t query = step.query_begin_[seq];
    if (step.query_begin_[seq + 1] != query + 1) continue;
    const int32_t num_tokens = step.key_end_[query];
    if (num_tokens < std::max(1, min_tokens)) continue;
    scored[seq] = 1;
    settled_ &= step.slots_[query] < 0;
    rows_.push_back(query);
    Sequence sequence{};
    sequence.num_tokens = num_tokens;
    sequence.num_blocks = ceil_div(num_tokens, kBlockTokens);
    sequence.top_k = std::clamp(static_cast<int32_t>(ratio * num_tokens), 1, num_tokens);
    sequence.num_slices = ceil_div(sequence.top_k, kBlockTokens);
    sequence.pages = step.pages_.data() + step.pages_begin_[seq];
    sequence.logits = reserve(num_heads * sequence.num_blocks * kBlockTokens * 4);
    sequence.block_sums = reserve(num_heads * sequence.num_blocks * 8);
    sequence.tokens = reserve(num_heads * sequence.top_k * 4);
    sequence.partials = reserve(num_heads * sequence.num_slices * partial_floats(1, layout.head_dim) * 4);
    sequence.heads = reserve(num_heads * static_cast<int64_t>(sizeof(Head)));
    sequences_.push_back(sequence);
    num_blocks += int64_t{sequence.num_blocks} * layout.num_kv_heads;
  }
  others_ = step.make_plan(0, scored);

  const auto run = static_cast<int32_t>(std::clamp<int64_t>(num_blocks / (8 * num_threads), 1, 8));
  for (int32_t i = 0; i < static_cast<int32_t>(sequences_.size()); ++i) {
    const Sequence& sequence = sequences_[i];
    for (int32_t head = 0; head < layout.num_kv_heads; ++head) {
      for (int32_t block = 0; block < sequence.num_blocks; block += run) {
        score_items_.push_back({i, head, block, std::min(block + run, sequence.num_blocks)});
      }
    }
    // The heads that share values follow one another.
    for (int32_t head = 0; head < step.num_heads_; ++head) {
      for (int32_t slice = 0; slice < sequence.num_slices; ++slice) attend_items_.push_back({i, head, slice, slice + 1});
    }
  }
  scratch_bytes_ = std::max(others_->scratch_bytes, attend_scratch_bytes(group_, layout.head_dim));
}

std::unique_ptr<HybridGenStep::Attend> HybridGenStep::submit(const Step::Queries& queries, Part part) {
  step_.check(queries);
  auto job = std::make_unique<Attend>(*this, queries, part);
  job->ticket_ = step_.pool_.submit(*job);
  return job;
}

HybridGenStep::Attend::Attend(HybridGenStep& step, const Step::Queries& queries, Part part)
    : step_(step), queries_(queries), part_(part), buffer_(step.step_.pool_.buffers.take()) {
  if (part != Part::scored && !step.others_->items.empty()) {
    others_ = std::make_unique<Step::Attend>(step.step_, *step.others_, queries);
    num_other_items_ = static_cast<int32_t>(step.others_->items.size()) * step.step_.layout_.num_kv_heads;
  }
  if (part == Part::others) return;
  buffer_.reserve(step.job_bytes_);
  for (const Sequence& sequence : step.sequences_) {
    for (int32_t head = 0; head < step.step_.num_heads_; ++head) {
      Head& state = *new (at<Head>(sequence.heads, head)) Head{};
      state.pending.store(sequence.num_slices, std::memory_order_relaxed);
    }
  }
}

HybridGenStep::Attend::~Attend() {
  wait();
  step_.step_.pool_.buffers.give(std::move(buffer_));
}

// 0 score (and what is attended in full), 1 choose, 2 attend.
void HybridGenStep::Attend::begin_phase(int32_t phase, int32_t* num_items) {
  const int32_t num_groups = step_.step_.pool_.num_groups();
  const bool scores = part_ != Part::others;
  int32_t total = 0;
  if (phase == 0) {
    total = num_other_items_ + (scores ? static_cast<int32_t>(step_.score_items_.size()) : 0);
  } else if (scores && phase == 1) {
    total = static_cast<int32_t>(step_.sequences_.size()) * step_.step_.num_heads_;
  } else if (scores && phase == 2) {
    total = static_cast<int32_t>(step_.attend_items_.size());
  } else if (scores) {
    TopKStats& stats = step_.record_.layers[static_cast<size_t>(queries_.layer)];
    for (const Sequence& sequence : step_.sequences_) {
      for (int32_t head = 0; head < step_.step_.num_heads_; ++head) {
        const double mass = at<Head>(sequence.heads, head)->mass;
        stats.count += 1;
        stats.sum += mass;
        stats.minimum = std::min(stats.minimum, mass);
        stats.scanned += sequence.num_tokens;
        stats.attended += sequence.top_k;
      }
    }
  }
  for (int32_t i = 0; i < num_groups; ++i) num_items[i] = (total + num_groups - 1 - i) / num_groups;
}

void HybridGenStep::Attend::run_item(int32_t phase, int32_t group_index, int32_t item_index, Worker& worker) {
  const int32_t index = item_index * step_.step_.pool_.num_groups() + group_index;
  if (phase == 0 && index < num_other_items_) return others_->run_item(0, group_index, item_index, worker);
  const int64_t begin_ns = now_ns();
  if (phase == 0) {
    score(step_.score_items_[index - num_other_items_], worker);
  } else if (phase == 1) {
    choose(index / step_.step_.num_heads_, index % step_.step_.num_heads_);
  } else {
    attend(step_.attend_items_[index], worker);
  }
  step_.record_.busy_ns.fetch_add(now_ns() - begin_ns, std::memory_order_relaxed);
}

AttendTask HybridGenStep::Attend::task(int32_t number, int32_t kv_head) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = step_.sequences_[number];
  const int64_t offset =
      (int64_t{queries_.layer} * layout.num_kv_heads + kv_head) * layout.head_elements() * dtype_bytes(layout.dtype);
  AttendTask task{};
  task.k = step.k_pages_ + offset;
  task.v = step.v_pages_ + offset;
  task.page_stride = layout.page_stride;
  task.pages = sequence.pages;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_queries = 1;
  task.begin = &kZero;
  task.scale = step.scale_;
  task.soft_cap = queries_.soft_cap;
  task.logits_stride = int64_t{sequence.num_blocks} * kBlockTokens;
  return task;
}

void HybridGenStep::Attend::score(const Item& item, Worker& worker) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = step_.sequences_[item.sequence];
  const int64_t head = int64_t{item.head} * step_.group_;
  const int64_t bytes = dtype_bytes(layout.dtype);
  AttendTask task = this->task(item.sequence, item.head);
  task.num_keys = ceil_div(sequence.num_tokens, layout.page_size) * layout.page_size;
  task.group = step_.group_;
  task.end = &sequence.num_tokens;
  task.q = queries_.q + (row(item.sequence) * queries_.q_stride + head * layout.head_dim) * bytes;
  task.q_stride = queries_.q_stride;
  task.block_begin = item.begin;
  task.block_end = item.end;
  task.logits = logits(sequence, static_cast<int32_t>(head));
  task.block_sums = at<float>(sequence.block_sums, head * sequence.num_blocks * 2);
  Reading reading(step.memory_);
  step.count(reading, Role::k, sequence.pages, item.begin * kBlockTokens,
             std::min(item.end * kBlockTokens, sequence.num_tokens));
  step.pool_.kernels().score[static_cast<int>(layout.dtype)](task, worker.scratch());
  const int64_t tokens = std::min(item.end * kBlockTokens, sequence.num_tokens) - item.begin * kBlockTokens;
  worker.count_bytes(queries_.layer, tokens * layout.head_dim * bytes);
}

void HybridGenStep::Attend::choose(int32_t number, int32_t head) const {
  const Sequence& sequence = step_.sequences_[number];
  int32_t* tokens = at<int32_t>(sequence.tokens, int64_t{head} * sequence.top_k);
  if (sequence.top_k == sequence.num_tokens) {
    std::iota(tokens, tokens + sequence.top_k, 0);
  } else {
    find_top_k(logits(sequence, head), sequence.num_tokens, sequence.top_k, tokens);
  }
  const float* sums = at<float>(sequence.block_sums, int64_t{head} * sequence.num_blocks * 2);
  float maximum = -std::numeric_limits<float>::infinity();
  for (int32_t block = 0; block < sequence.num_blocks; ++block) maximum = std::max(maximum, sums[2 * block]);
  float total = 0;
  for (int32_t block = 0; block < sequence.num_blocks; ++block) {
    total += sums[2 * block + 1] * std::exp2(sums[2 * block] - maximum);
  }
  at<Head>(sequence.heads, head)->total = maximum * kLn2 + std::log(total);
}

// Tokens [begin, end) of the selected ones, whose values one query head reads.
void HybridGenStep::Attend::count(Reading& reading, const Sequence& sequence, const int32_t* selected,
                                  const float* logits, float total, int32_t begin, int32_t end) const {
  const Step& step = step_.step_;
  const int64_t row_bytes = step.layout_.head_dim * dtype_bytes(step.layout_.dtype);
  const float cap = queries_.soft_cap;
  // A query head's part in what its KV head reads and retains.
  const float share = 1.0f / static_cast<float>(step_.group_);
  for (int32_t i = begin; i < end; ++i) {
    const int32_t page = sequence.pages[selected[i] / step.layout_.page_size];
    reading.add(Role::v, page, row_bytes);
    if (!step.memory_->has_heat()) continue;
    float logit = logits[selected[i]] * step.scale_;
    if (cap > 0.0f) logit = cap * std::tanh(logit / cap);
    step.memory_->heat(page, std::exp(logit - total) * share, share);
  }
}

void HybridGenStep::Attend::attend(const Item& item, Worker& worker) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = step_.sequences_[item.sequence];
  const auto dtype = static_cast<int>(layout.dtype);
  const int64_t floats = partial_floats(1, layout.head_dim);
  Head& head = *at<Head>(sequence.heads, item.head);
  AttendTask task = this->task(item.sequence, item.head / step_.group_);
  task.k = task.v;  // what is prefetched after a block's values: the next block's
  task.num_keys = sequence.top_k;
  task.selected = at<int32_t>(sequence.tokens, int64_t{item.head} * sequence.top_k);
  task.logits = logits(sequence, item.head);
  task.group = 1;
  task.end = &sequence.top_k;
  task.block_begin = item.begin;
  task.block_end = item.end;
  task.partial = at<float>(sequence.partials, int64_t{item.head} * sequence.num_slices * floats);
  const int64_t out_row = row(item.sequence);
  task.out = reinterpret_cast<float*>(queries_.out) + out_row * queries_.out_stride + int64_t{item.head} * layout.head_dim;
  task.out_float32 = true;
  task.lse = queries_.lse + out_row * step.num_heads_ + item.head;
  Reading reading(step.memory_);
  const int32_t end = std::min(item.end * kBlockTokens, sequence.top_k);
  if (reading.counts()) count(reading, sequence, task.selected, task.logits, head.total, item.begin * kBlockTokens, end);
  step.pool_.kernels().attend[dtype](task, worker.scratch());
  const int64_t tokens = end - item.begin * kBlockTokens;
  worker.count_bytes(queries_.layer, tokens * layout.head_dim * dtype_bytes(layout.dtype));
  // Whoever finishes a head's last slice merges its slices, in their order.
  if (head.pending.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  task.block_begin = 0;
  task.block_end = sequence.num_slices;
  step.pool_.kernels().fold[dtype](task, worker.scratch());
  const double mass = std::exp(static_cast<double>(*task.lse) - head.total);
  head.mass = mass >= 0 ? std::min(mass, 1.0) : 0;  // NaN: nothing is known of it
}

}  // namespace hybridgen
