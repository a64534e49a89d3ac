#include "mass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <string>

namespace hybridgen {
namespace {

constexpr float kLog2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

constexpr int32_t kSliceTokens = 512;    // selected tokens attended together, at least; a block's more at most
constexpr int32_t kMaxRounds = 4;        // of widening; then everything
constexpr double kFullShare = 0.6;       // of the tokens selected: reading all in a row is as fast
constexpr int32_t kSampledPages = 32;    // whose values the tail term takes the mean of
constexpr float kDeviations = 3.0f;      // of the estimates' error that the floor allows for
constexpr double kUneven = 1.1;          // whole pairs are dealt out if that takes at most this much longer

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
T* carve(std::byte*& memory, int64_t count) {
  T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  memory = reinterpret_cast<std::byte*>(p + count);
  return p;
}

struct Slice {  // of the selected tokens
  int32_t begin;  // blocks
  int32_t end;
  int32_t count;
};

}  // namespace

void MassStats::add(const MassStats& other) {
  count += other.count;
  sum += other.sum;
  minimum = std::min(minimum, other.minimum);
  scanned += other.scanned;
  attended += other.attended;
  widened += other.widened;
  full += other.full;
}

struct MassStep::Pair {  // a sequence and a KV head: where its attention stands
  const Sequence* sequence;
  int32_t head;
  bool estimated;
  bool dense;       // all tokens, in a row
  int32_t round;    // of widening
  int32_t num_slices;
  uint32_t low;     // keys from here on are selected
  uint32_t high;    // keys from here on have been attended
  double budget;    // of the estimated mass that may be left out
  MassStats stats;
  std::atomic<int32_t> pending;  // items of the phase

  uint16_t* weights;    // [num_blocks, 64, group, 32]
  uint16_t* keys;       // [num_blocks, 64, 32]
  uint32_t* histogram;  // [num_blocks, kBins]
  uint32_t* bins;       // [kBins]
  float* reference;     // [group]
  float* sum;           // [group, num_blocks]
  float* rest;          // [group, num_blocks]
  float* scale;         // [2, chunks, num_blocks]
  float* factor;        // [group]  weights to scores
  float* total;         // [group]  natural log of the sum of exp(estimate) over all tokens
  float* margin;        // [group]  of the estimates, natural log
  float* tail;          // [group]  natural log of the same over the tokens left out
  Slice* slices;        // [num_blocks]
  float* out;           // [num_blocks + 1, group, head_dim]  of the tokens attended before, then of each slice
  float* lse;           // [num_blocks + 1, group]
};

int64_t MassStep::memory_bytes(int32_t num_blocks) const {
  const int64_t blocks = num_blocks;
  return round_up(blocks * kIndexBlock * group_ * 2) + round_up(blocks * kIndexBlock * 2) +
         round_up((blocks + 1) * kBins * 4) + 2 * round_up(group_ * blocks * 4) + round_up(2 * chunks_ * blocks * 4) +
         5 * round_up(group_ * 4) + round_up(blocks * static_cast<int64_t>(sizeof(Slice))) +
         round_up((blocks + 1) * group_ * step_.layout_.head_dim * 4) + round_up((blocks + 1) * group_ * 4) + 16 * 64;
}

MassStep::MassStep(const Step& step, const Index& index, const std::string& isa, const MassOptions& options,
                   MassRecord& record)
    : step_(step),
      index_(index),
      kernels_(find_index_kernels(isa)),
      options_(options),
      record_(record),
      group_(step.num_heads_ / step.layout_.num_kv_heads),
      chunks_(index_chunks(step.layout_.head_dim)) {
  const int32_t num_kv_heads = step.layout_.num_kv_heads;
  const int32_t page_size = step.layout_.page_size;
  std::vector<char> scanned(step.kv_len_.size());
  int64_t total = 0;
  int32_t longest = 0;
  for (int32_t seq = 0; seq < static_cast<int32_t>(step.kv_len_.size()); ++seq) {
    const int32_t query = step.query_begin_[seq];
    if (step.query_begin_[seq + 1] != query + 1) continue;
    const int32_t num_tokens = step.key_end_[query];
    if (num_tokens < std::max(1, options.min_tokens)) continue;
    scanned[seq] = 1;
    const bool begins_here = step.before_[step.before_begin_[seq] + 1] > 0;
    sequences_.push_back({query, num_tokens, ceil_div(num_tokens, kIndexBlock),
                          begins_here ? std::min(options.num_sinks, num_tokens) : 0,
                          num_tokens / page_size * page_size, step.pages_.data() + step.pages_begin_[seq]});
    total += num_tokens;
    longest = std::max(longest, num_tokens);
  }
  others_ = step.make_plan(0, scanned);

  // Whole pairs need no waiting in between and keep their weights in a core's own cache. They are cut where that would
  // leave threads without work.
  const auto num_pairs = static_cast<int32_t>(sequences_.size()) * num_kv_heads;
  const int32_t num_threads = step.pool_.num_threads();
  std::vector<int32_t> order(num_pairs);
  for (int32_t i = 0; i < num_pairs; ++i) order[i] = i;
  const auto tokens_of = [&](int32_t pair) { return sequences_[pair / num_kv_heads].num_tokens; };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return tokens_of(a) > tokens_of(b); });
  std::vector<int64_t> loads(num_threads);
  for (const int32_t pair : order) *std::min_element(loads.begin(), loads.end()) += tokens_of(pair);
  const double share = static_cast<double>(total) * num_kv_heads / num_threads;
  const bool whole = static_cast<double>(*std::max_element(loads.begin(), loads.end())) <= kUneven * share;

  int64_t num_blocks = 0;
  memory_.assign(num_pairs, -1);
  int32_t largest = 0;
  for (const int32_t pair : order) {
    const int32_t blocks = sequences_[pair / num_kv_heads].num_blocks;
    if (whole || tokens_of(pair) * 4 < share) {
      largest = std::max(largest, blocks);
      continue;
    }
    memory_[pair] = job_bytes_;
    job_bytes_ += memory_bytes(blocks);
    num_blocks += blocks;
  }
  const auto run = static_cast<int32_t>(std::clamp<int64_t>(num_blocks / (8 * num_threads), 1, 8));
  for (const int32_t pair : order) {
    if (memory_[pair] < 0) continue;
    const int32_t blocks = sequences_[pair / num_kv_heads].num_blocks;
    for (int32_t begin = 0; begin < blocks; begin += run) cut_items_.push_back({pair, begin, std::min(begin + run, blocks)});
  }
  items_ = cut_items_;
  for (const int32_t pair : order) {
    if (memory_[pair] < 0) items_.push_back({pair, 0, 0});
  }
  const int64_t scratch =
      std::max({round_up(index_query_bytes(group_, step.layout_.head_dim)) + scan_scratch_bytes(group_, step.layout_.head_dim),
                kScoreScratchBytes,
                pick_scratch_bytes(group_) + (kSliceTokens + kIndexBlock + 16) * 4 + 64 +
                    attend_scratch_bytes(group_, step.layout_.head_dim)});
  scratch_bytes_ = std::max(others_->scratch_bytes, scratch + 128 + (largest > 0 ? memory_bytes(largest) : 0));
}

std::unique_ptr<MassStep::Attend> MassStep::submit(const Step::Queries& queries) {
  step_.check(queries);
  auto job = std::make_unique<Attend>(*this, queries);
  job->ticket_ = step_.pool_.submit(*job);
  return job;
}

MassStep::Attend::Attend(MassStep& step, const Step::Queries& queries)
    : step_(step), queries_(queries), buffer_(step.step_.pool_.buffers.take()) {
  if (!step.others_->items.empty()) others_ = std::make_unique<Step::Attend>(step.step_, *step.others_, queries);
  const auto num_pairs = static_cast<int32_t>(step.memory_.size());
  const int64_t pair_bytes = round_up(num_pairs * static_cast<int64_t>(sizeof(Pair)));
  buffer_.reserve(pair_bytes + step.job_bytes_ + 64);
  pairs_ = reinterpret_cast<Pair*>(buffer_.data());
  for (int32_t i = 0; i < num_pairs; ++i) {
    Pair& pair = *new (pairs_ + i) Pair{};
    if (step.memory_[i] >= 0) bind(pair, i, buffer_.data() + pair_bytes + step.memory_[i]);
  }
  size_t most = 0;
  for (const Item& item : step.cut_items_) {
    pairs_[item.pair].pending.fetch_add(1, std::memory_order_relaxed);
    most += static_cast<size_t>(item.end - item.begin);
  }
  items_.reserve(most);
}

MassStep::Attend::~Attend() {
  wait();
  step_.step_.pool_.buffers.give(std::move(buffer_));
}

void MassStep::Attend::bind(Pair& pair, int32_t number, std::byte* memory) const {
  const int32_t num_kv_heads = step_.step_.layout_.num_kv_heads;
  const int64_t head_dim = step_.step_.layout_.head_dim;
  const int64_t group = step_.group_;
  pair.sequence = &step_.sequences_[number / num_kv_heads];
  pair.head = number % num_kv_heads;
  pair.high = 0x10000;
  pair.budget = 1.0 - step_.options_.mass;
  const int64_t blocks = pair.sequence->num_blocks;
  pair.weights = carve<uint16_t>(memory, blocks * kIndexBlock * group);
  pair.keys = carve<uint16_t>(memory, blocks * kIndexBlock);
  pair.bins = carve<uint32_t>(memory, (blocks + 1) * kBins);
  pair.histogram = pair.bins + kBins;
  pair.sum = carve<float>(memory, group * blocks);
  pair.rest = carve<float>(memory, group * blocks);
  pair.scale = carve<float>(memory, 2 * step_.chunks_ * blocks);
  pair.reference = carve<float>(memory, group);
  pair.factor = carve<float>(memory, group);
  pair.total = carve<float>(memory, group);
  pair.margin = carve<float>(memory, group);
  pair.tail = carve<float>(memory, group);
  pair.slices = carve<Slice>(memory, blocks);
  pair.out = carve<float>(memory, (blocks + 1) * group * head_dim);
  pair.lse = carve<float>(memory, (blocks + 1) * group);
}

// What is to be done in a phase: 0 scan (and whatever is not cut), 1 score, 2 attend, 3 and on attend more.
void MassStep::Attend::begin_phase(int32_t phase, int32_t* num_items) {
  const int32_t num_groups = step_.step_.pool_.num_groups();
  int32_t total = 0;
  if (phase == 0) {
    num_other_items_ = static_cast<int32_t>(step_.others_->items.size()) * step_.step_.layout_.num_kv_heads;
    total = num_other_items_ + static_cast<int32_t>(step_.items_.size());
  } else if (phase == 1) {
    for (const Item& item : step_.cut_items_) {
      Pair& pair = pairs_[item.pair];
      if (item.begin == 0) pair.pending.store(0, std::memory_order_relaxed);
      pair.pending.fetch_add(1, std::memory_order_relaxed);
    }
    total = static_cast<int32_t>(step_.cut_items_.size());
  } else if (!step_.cut_items_.empty()) {
    items_.clear();
    for (size_t number = 0; number < step_.memory_.size(); ++number) {
      Pair& pair = pairs_[number];
      if (step_.memory_[number] < 0 || pair.num_slices == 0) continue;
      pair.pending.store(pair.num_slices, std::memory_order_relaxed);
      for (int32_t i = 0; i < pair.num_slices; ++i) items_.push_back({static_cast<int32_t>(number), i, 0});
    }
    total = static_cast<int32_t>(items_.size());
  }
  if (total == 0) {
    MassStats& stats = step_.record_.layers[static_cast<size_t>(queries_.layer)];
    for (size_t number = 0; number < step_.memory_.size(); ++number) stats.add(pairs_[number].stats);
  }
  for (int32_t i = 0; i < num_groups; ++i) num_items[i] = (total + num_groups - 1 - i) / num_groups;
}

void MassStep::Attend::run_item(int32_t phase, int32_t group_index, int32_t item_index, Worker& worker) {
  const int32_t num_groups = step_.step_.pool_.num_groups();
  const int32_t index = item_index * num_groups + group_index;
  if (phase == 0) {
    if (index < num_other_items_) return others_->run_item(0, group_index, item_index, worker);
    const Item& item = step_.items_[index - num_other_items_];
    if (item.end == 0) return run_pair(item.pair, worker);
    Pair& pair = pairs_[item.pair];
    scan(pair, item.begin, item.end, worker);
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) weigh(pair, worker.scratch());
  } else if (phase == 1) {
    const Item& item = step_.cut_items_[index];
    Pair& pair = pairs_[item.pair];
    if (pair.estimated) score(pair, item.begin, item.end, worker.scratch());
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) choose(pair);
  } else {
    const Item& item = items_[index];
    Pair& pair = pairs_[item.pair];
    attend(pair, item.begin, worker);
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(pair);
  }
}

void MassStep::Attend::run_pair(int32_t number, Worker& worker) {
  Pair& pair = pairs_[number];
  std::byte* scratch = worker.scratch();
  // Behind what the steps below need for themselves.
  const int64_t bytes = step_.memory_bytes(step_.sequences_[number / step_.step_.layout_.num_kv_heads].num_blocks);
  bind(pair, number, scratch + step_.scratch_bytes_ - bytes);
  const int32_t num_blocks = pair.sequence->num_blocks;
  scan(pair, 0, num_blocks, worker);
  weigh(pair, scratch);
  if (pair.estimated) score(pair, 0, num_blocks, scratch);
  choose(pair);
  do {
    for (int32_t i = 0; i < pair.num_slices; ++i) attend(pair, i, worker);
  } while (!finish(pair));
}

ScanTask MassStep::Attend::scan_task(const Pair& pair, std::byte*& scratch) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = *pair.sequence;
  const int64_t piece_bytes = layout.page_size / kIndexGroup * index_group_bytes(layout.head_dim);
  std::byte* memory = carve<std::byte>(scratch, index_query_bytes(step_.group_, layout.head_dim));
  const std::byte* q = queries_.q + (sequence.query * queries_.q_stride + int64_t{pair.head} * step_.group_ * layout.head_dim) *
                                        dtype_bytes(layout.dtype);
  ScanTask task{};
  task.index = step_.index_.k + (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * piece_bytes;
  task.page_stride = int64_t{layout.num_layers} * layout.num_kv_heads * piece_bytes;
  task.block_table = sequence.pages;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_tokens = sequence.num_tokens;
  task.num_sinks = sequence.num_sinks;
  task.query = step_.kernels_.prepare[static_cast<int>(layout.dtype)](q, step_.group_, layout.head_dim, step.scale_,
                                                                      queries_.soft_cap, memory);
  task.num_blocks = sequence.num_blocks;
  task.reference = pair.reference;
  task.weights = pair.weights;
  task.sum = pair.sum;
  task.scale = pair.scale;
  return task;
}

void MassStep::Attend::scan(Pair& pair, int32_t begin, int32_t end, Worker& worker) const {
  std::byte* scratch = worker.scratch();
  ScanTask task = scan_task(pair, scratch);
  task.block_begin = begin;
  task.block_end = end;
  step_.kernels_.scan(task, scratch);
  const int64_t tokens = std::min(end * kIndexBlock, task.num_tokens) - begin * kIndexBlock;
  worker.count_bytes(queries_.layer, tokens * index_group_bytes(task.head_dim) / kIndexGroup);
}

// After the scan: what a weight is worth, and how far the estimates are to be trusted.
void MassStep::Attend::weigh(Pair& pair, std::byte* scratch) const {
  const IndexQuery query = scan_task(pair, scratch).query;
  const int32_t num_blocks = pair.sequence->num_blocks;
  pair.estimated = is_estimable(query, num_blocks, pair.sum, pair.scale);
  if (!pair.estimated) return;
  for (int32_t row = 0; row < step_.group_; ++row) {
    float total = 0;
    for (int32_t block = 0; block < num_blocks; ++block) total += pair.sum[int64_t{row} * num_blocks + block];
    pair.factor[row] = 1.0f / (total * static_cast<float>(step_.group_));
    pair.total[row] = (pair.reference[row] - kReferenceWeight + std::log2(total)) * kLog2;
    float variance = 0;
    for (int32_t chunk = 0; chunk < step_.chunks_; ++chunk) {
      const float* scales = pair.scale + int64_t{chunk} * num_blocks;
      const float error = query.error[int64_t{row} * step_.chunks_ + chunk] * *std::max_element(scales, scales + num_blocks);
      variance += error * error;
    }
    pair.margin[row] = kDeviations * std::sqrt(variance) * kLog2;
  }
}

void MassStep::Attend::score(Pair& pair, int32_t begin, int32_t end, std::byte* scratch) const {
  const Sequence& sequence = *pair.sequence;
  const ScoreTask task{step_.group_, sequence.num_tokens, sequence.num_sinks, sequence.always_begin, begin, end,
                       pair.weights, pair.factor, pair.keys, pair.histogram};
  step_.kernels_.score(task, scratch);
}

// After the scores, and again for each widening: which keys are attended next, and in which slices.
void MassStep::Attend::choose(Pair& pair) const {
  const Sequence& sequence = *pair.sequence;
  const int32_t num_blocks = sequence.num_blocks;
  pair.num_slices = 0;
  int64_t selected = 0;
  if (pair.estimated && pair.round == 0) {
    std::fill_n(pair.bins, kBins, 0u);
    for (int32_t block = 0; block < num_blocks; ++block) {
      for (int32_t bin = 0; bin < kBins; ++bin) pair.bins[bin] += pair.histogram[int64_t{block} * kBins + bin];
    }
    pair.low = find_threshold(pair.bins, pair.budget);
    for (int32_t bin = bin_of(pair.low); bin < kBins; ++bin) selected += pair.bins[bin];
    pair.dense = static_cast<double>(selected) > kFullShare * sequence.num_tokens;
  }
  if (!pair.estimated || pair.dense) {
    pair.dense = true;
    for (int32_t block = 0; block < num_blocks; ++block) {
      const int32_t left = sequence.num_tokens - block * kIndexBlock;
      pair.slices[pair.num_slices++] = {block, block + 1, std::min(left, kIndexBlock)};
    }
    return;
  }
  Slice slice{0, 0, 0};
  const int32_t first = bin_of(pair.low);
  const int32_t last = bin_of(pair.high);
  for (int32_t block = 0; block < num_blocks; ++block) {
    const uint32_t* bins = pair.histogram + int64_t{block} * kBins;
    uint32_t count = 0;
    for (int32_t bin = first; bin < last; ++bin) count += bins[bin];
    slice.count += static_cast<int32_t>(count);
    slice.end = block + 1;
    if (slice.count >= kSliceTokens || slice.end == num_blocks) {
      pair.slices[pair.num_slices++] = slice;
      slice = {slice.end, slice.end, 0};
    }
  }
}

void MassStep::Attend::attend(Pair& pair, int32_t number, Worker& worker) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = *pair.sequence;
  const Slice& slice = pair.slices[number];
  const int64_t group = step_.group_;
  float* lse = pair.lse + (number + 1) * group;
  std::byte* scratch = worker.scratch();

  AttendTask task{};
  task.num_keys = slice.count;
  task.block_end = ceil_div(slice.count, kBlockTokens);
  int32_t begin = 0;
  int32_t end = slice.count;
  if (pair.dense) {
    task.num_keys = ceil_div(sequence.num_tokens, layout.page_size) * layout.page_size;
    begin = slice.begin * kIndexBlock;
    end = begin + slice.count;
    task.block_begin = begin / kBlockTokens;
    task.block_end = ceil_div(end, kBlockTokens);
  } else {
    int32_t* tokens = carve<int32_t>(scratch, slice.count + 16);
    PickTask pick{step_.group_, sequence.num_blocks, sequence.num_tokens, slice.begin, slice.end, pair.low, pair.high,
                  pair.weights, pair.keys, tokens, pair.rest};
    step_.kernels_.pick(pick, scratch);
    task.selected = tokens;
  }
  if (slice.count == 0) {
    std::fill_n(lse, group, -kInfinity);
    return;
  }
  const int64_t bytes = dtype_bytes(layout.dtype);
  const int64_t offset = (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * layout.head_elements() * bytes;
  task.k = step.k_pages_ + offset;
  task.v = step.v_pages_ + offset;
  task.page_stride = layout.page_elements();
  task.pages = sequence.pages;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_queries = 1;
  task.group = step_.group_;
  task.begin = &begin;
  task.end = &end;
  task.scale = step.scale_;
  task.soft_cap = queries_.soft_cap;
  task.q = queries_.q + (sequence.query * queries_.q_stride + pair.head * group * layout.head_dim) * bytes;
  task.q_stride = queries_.q_stride;
  task.out = pair.out + (number + 1) * group * layout.head_dim;
  task.out_float32 = true;
  task.lse = lse;
  step.pool_.kernels().attend[static_cast<int>(layout.dtype)](task, scratch);
  worker.count_bytes(queries_.layer, 2 * int64_t{slice.count} * layout.head_dim * bytes);
}

// After the last slice: adds up, measures, and writes the result or chooses what else to attend.
bool MassStep::Attend::finish(Pair& pair) const {
  const Sequence& sequence = *pair.sequence;
  const int32_t group = step_.group_;
  const int32_t head_dim = step_.step_.layout_.head_dim;
  const int32_t first = pair.round == 0 ? 1 : 0;
  double lowest = 1;  // retained mass, errors of the estimates counted against it
  double minimum = 1;
  double sum = 0;
  for (int32_t row = 0; row < group; ++row) {
    float maximum = -kInfinity;
    for (int32_t i = first; i <= pair.num_slices; ++i) maximum = std::max(maximum, pair.lse[i * group + row]);
    const float shift = maximum > -kInfinity ? maximum : 0.0f;
    float total = 0;
    for (int32_t i = first; i <= pair.num_slices; ++i) total += std::exp(pair.lse[i * group + row] - shift);
    float* out = pair.out + int64_t{row} * head_dim;
    const float before = first == 0 ? std::exp(pair.lse[row] - shift) / total : 0.0f;
    for (int32_t d = 0; d < head_dim; ++d) out[d] = before > 0 ? out[d] * before : 0.0f;
    for (int32_t i = 1; i <= pair.num_slices; ++i) {
      if (pair.lse[i * group + row] == -kInfinity) continue;
      const float weight = std::exp(pair.lse[i * group + row] - shift) / total;
      const float* part = pair.out + (int64_t{i} * group + row) * head_dim;
      for (int32_t d = 0; d < head_dim; ++d) out[d] += part[d] * weight;
    }
    const float lse = shift + std::log(total);
    pair.lse[row] = lse;

    float rest = 0;
    if (!pair.dense) {
      for (int32_t block = 0; block < sequence.num_blocks; ++block) rest += pair.rest[int64_t{row} * sequence.num_blocks + block];
    }
    pair.tail[row] = rest > 0 ? pair.total[row] + std::log(rest * pair.factor[row] * static_cast<float>(group)) : -kInfinity;
    const double gap = pair.tail[row] - lse;
    const double mass = rest > 0 ? 1.0 / (1.0 + std::exp(gap)) : 1.0;
    sum += mass;
    minimum = std::min(minimum, mass);
    if (rest > 0) lowest = std::min(lowest, 1.0 / (1.0 + std::exp(gap + pair.margin[row])));
  }
  for (int32_t i = 0; i < pair.num_slices; ++i) pair.stats.attended += pair.slices[i].count;
  const bool complete = pair.dense || pair.low == 0;
  if (!complete && !(lowest >= step_.options_.floor)) {  // NaN: everything is attended, and says so
    pair.stats.widened = 1;
    const uint32_t high = pair.low;
    while (pair.low == high && ++pair.round <= kMaxRounds) {
      pair.budget /= 2;
      pair.low = find_threshold(pair.bins, pair.budget);
    }
    if (pair.round > kMaxRounds) pair.low = 0;
    pair.high = high;
    choose(pair);
    return false;
  }
  pair.stats.count = group;
  pair.stats.sum = complete ? group : sum;
  pair.stats.minimum = complete ? 1 : minimum;
  pair.stats.scanned = sequence.num_tokens;
  pair.stats.full = complete;
  pair.num_slices = 0;
  write(pair);
  return true;
}

void MassStep::Attend::write(Pair& pair) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = *pair.sequence;
  const int32_t group = step_.group_;
  const int32_t head_dim = layout.head_dim;
  const int32_t full_pages = sequence.num_tokens / layout.page_size;
  bool has_tail = false;
  for (int32_t row = 0; row < group; ++row) has_tail |= pair.tail[row] > -kInfinity;
  const bool tail = step_.options_.tail && has_tail && full_pages > 0;
  float mean[kMaxHeadDim] = {};
  if (tail) {
    const int32_t stride = ceil_div(full_pages, kSampledPages);
    const int32_t pages = ceil_div(full_pages, stride);
    const float* v_sum = step_.index_.v_sum + (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * head_dim;
    const int64_t page_stride = int64_t{layout.num_layers} * layout.num_kv_heads * head_dim;
    for (int32_t page = 0; page < full_pages; page += stride) {
      const float* sums = v_sum + sequence.pages[page] * page_stride;
      for (int32_t d = 0; d < head_dim; ++d) mean[d] += sums[d];
    }
    for (int32_t d = 0; d < head_dim; ++d) mean[d] /= static_cast<float>(pages * layout.page_size);
  }
  for (int32_t row = 0; row < group; ++row) {
    const int32_t head = pair.head * group + row;
    float* out = reinterpret_cast<float*>(queries_.out) + sequence.query * queries_.out_stride + int64_t{head} * head_dim;
    float* lse = queries_.lse + int64_t{sequence.query} * step.num_heads_ + head;
    const float* attended = pair.out + int64_t{row} * head_dim;
    const float weight = tail ? std::exp(pair.tail[row] - pair.lse[row]) : 0.0f;  // of the rest; 1 for what was attended
    const float total = 1.0f + weight;
    for (int32_t d = 0; d < head_dim; ++d) out[d] = weight > 0 ? (attended[d] + mean[d] * weight) / total : attended[d];
    *lse = pair.lse[row] + std::log1p(weight);
  }
}

}  // namespace hybridgen
