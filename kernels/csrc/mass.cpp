#include "mass.h"

#include <algorithm>
#include <bit>
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
constexpr double kForetoldBudget = 0.5;  // of what may be left out: the true query turns to other tokens too
constexpr float kSampleDoubt = 0.693147181f;  // log 2: what a sample of the rest may be wrong by
constexpr double kUneven = 1.1;          // whole pairs are dealt out if that takes at most this much longer

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
T* carve(std::byte*& memory, int64_t count) {
  T* p = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  memory = reinterpret_cast<std::byte*>(p + count);
  return p;
}

struct Slice {     // of the tokens to attend
  int32_t begin;   // blocks
  int32_t end;
  int32_t count;   // tokens
  int32_t first;   // of them, if they lie in a row; -1: those in the blocks that are selected
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
  foretold += other.foretold;
  rescanned += other.rescanned;
}

struct MassStep::Pair {  // a sequence and a KV head: where its attention stands
  const Sequence* sequence;
  int32_t head;
  bool estimated;
  bool dense;       // all tokens, in a row
  bool failed;      // foretold, and does not hold the floor
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
  float* true_reference;  // [group]  of the true queries, where the others are foretold ones
  float* before;        // [group, num_blocks]  sampled weights of the tokens left out, by the foretold queries
  float* now;           // [group, num_blocks]  by the true ones
  Slice* slices;        // [num_blocks + 1]
  float* out;           // [num_blocks + 2, group, head_dim]  of the tokens attended before, then of each slice
  float* lse;           // [num_blocks + 2, group]

  double retained_mass(int32_t row, float doubt) const;
  double lowest_mass(int32_t group, float doubt) const;
};

// Of the softmax, by what was attended and what the rest is estimated to be, times exp(doubt).
double MassStep::Pair::retained_mass(int32_t row, float doubt) const {
  return tail[row] > -kInfinity ? 1.0 / (1.0 + std::exp(static_cast<double>(tail[row]) - lse[row] + doubt)) : 1.0;
}

// The smallest over the heads, errors of the estimates counted against it; NaN if one is.
double MassStep::Pair::lowest_mass(int32_t group, float doubt) const {
  double lowest = 1;
  for (int32_t row = 0; row < group; ++row) {
    const double mass = retained_mass(row, margin[row] + doubt);
    if (!(mass >= lowest)) lowest = mass;
  }
  return lowest;
}

int64_t MassStep::memory_bytes(int32_t num_blocks) const {
  const int64_t blocks = num_blocks;
  return round_up(blocks * kIndexBlock * group_ * 2) + round_up(blocks * kIndexBlock * 2) +
         round_up((blocks + 1) * kBins * 4) + 4 * round_up(group_ * blocks * 4) + round_up(2 * chunks_ * blocks * 4) +
         6 * round_up(group_ * 4) + round_up((blocks + 1) * static_cast<int64_t>(sizeof(Slice))) +
         round_up((blocks + 2) * group_ * step_.layout_.head_dim * 4) + round_up((blocks + 2) * group_ * 4) + 18 * 64;
}

MassStep::Sequence MassStep::make_sequence(int32_t seq, int32_t num_tokens, int32_t newest) const {
  const bool begins_here = step_.before_[step_.before_begin_[seq] + 1] > 0;
  const int32_t page_size = step_.layout_.page_size;
  return {step_.query_begin_[seq], num_tokens, ceil_div(num_tokens, kIndexBlock),
          begins_here ? std::min(options_.num_sinks, num_tokens) : 0, num_tokens / page_size * page_size, newest,
          step_.pages_.data() + step_.pages_begin_[seq]};
}

// Items of some blocks of these pairs.
void MassStep::cut(const std::vector<Sequence>& sequences, const std::vector<int32_t>& pairs,
                   std::vector<Item>& items) const {
  const int32_t num_kv_heads = step_.layout_.num_kv_heads;
  int64_t num_blocks = 0;
  for (const int32_t pair : pairs) num_blocks += sequences[pair / num_kv_heads].num_blocks;
  const auto run = static_cast<int32_t>(std::clamp<int64_t>(num_blocks / (8 * step_.pool_.num_threads()), 1, 8));
  for (const int32_t pair : pairs) {
    const int32_t blocks = sequences[pair / num_kv_heads].num_blocks;
    for (int32_t begin = 0; begin < blocks; begin += run) items.push_back({pair, begin, std::min(begin + run, blocks)});
  }
}

MassStep::MassStep(const Step& step, const std::string& isa, const MassOptions& options,
                   MassRecord& record)
    : step_(step),
      kernels_(find_index_kernels(isa)),
      options_(options),
      record_(record),
      group_(step.num_heads_ / step.layout_.num_kv_heads),
      chunks_(index_chunks(step.layout_.head_dim)) {
  const int32_t num_kv_heads = step.layout_.num_kv_heads;
  std::vector<char> scanned(step.kv_len_.size());
  int64_t total = 0;
  for (int32_t seq = 0; seq < static_cast<int32_t>(step.kv_len_.size()); ++seq) {
    const int32_t query = step.query_begin_[seq];
    if (step.query_begin_[seq + 1] != query + 1) continue;
    const int32_t num_tokens = step.key_end_[query];
    if (num_tokens < std::max(2, options.min_tokens)) continue;
    scanned[seq] = 1;
    sequences_.push_back(make_sequence(seq, num_tokens, -1));
    const bool newest_here = step.slots_[query] >= 0;
    foretold_.push_back(make_sequence(seq, num_tokens - newest_here, newest_here ? num_tokens - 1 : -1));
    total += num_tokens;
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

  memory_.assign(num_pairs, -1);
  std::vector<int32_t> cut_pairs;
  int32_t longest = 0;
  for (const int32_t pair : order) {
    const int32_t blocks = sequences_[pair / num_kv_heads].num_blocks;
    longest = std::max(longest, blocks);
    foretold_memory_.push_back(0);
    if (whole || tokens_of(pair) * 4 < share) continue;
    memory_[pair] = job_bytes_;
    job_bytes_ += memory_bytes(blocks);
    cut_pairs.push_back(pair);
  }
  cut(sequences_, cut_pairs, cut_items_);
  items_ = cut_items_;
  for (const int32_t pair : order) {
    if (memory_[pair] < 0) items_.push_back({pair, 0, 0});
  }
  for (const int32_t pair : order) {
    foretold_memory_[pair] = foretold_bytes_;
    foretold_bytes_ += memory_bytes(foretold_[pair / num_kv_heads].num_blocks);
  }
  cut(foretold_, order, foretold_items_);
  const int64_t scratch =
      std::max({round_up(index_query_bytes(group_, step.layout_.head_dim)) + scan_scratch_bytes(group_, step.layout_.head_dim),
                kScoreScratchBytes,
                pick_scratch_bytes(group_) + (kSliceTokens + kIndexBlock + 16) * 4 + 64 +
                    attend_scratch_bytes(group_, step.layout_.head_dim)});
  scratch_bytes_ = std::max(others_->scratch_bytes, scratch + 128 + (longest > 0 ? memory_bytes(longest) : 0));
}

std::vector<int32_t> MassStep::scanned_rows() const {
  std::vector<int32_t> rows;
  for (const Sequence& sequence : sequences_) rows.push_back(sequence.query);
  return rows;
}

std::unique_ptr<MassStep::Attend> MassStep::submit(const Step::Queries& queries,
                                                   std::shared_ptr<Foretelling> foretelling) {
  step_.check(queries);
  if (foretelling != nullptr) foretelling->wait();
  auto job = std::make_unique<Attend>(*this, queries, std::move(foretelling));
  job->ticket_ = step_.pool_.submit(*job);
  return job;
}

std::shared_ptr<MassStep::Foretelling> MassStep::foretell(int32_t layer, const std::byte* q, int64_t q_stride,
                                                          float soft_cap) {
  Step::Queries queries{};
  queries.layer = layer;
  queries.q = q;
  queries.q_stride = q_stride;
  queries.soft_cap = soft_cap;
  step_.check(queries);
  auto job = std::make_shared<Foretelling>(*this, queries);
  job->ticket_ = step_.pool_.submit(*job);
  return job;
}

// ---- what both kinds of work do ----

MassStep::Work::Work(const MassStep& step, const Step::Queries& queries, Rows rows)
    : step_(step), queries_(queries), rows_(rows), buffer_(step.step_.pool_.buffers.take()) {}

MassStep::Work::~Work() { step_.step_.pool_.buffers.give(std::move(buffer_)); }

void MassStep::Work::bind(Pair& pair, const Sequence& sequence, int32_t head, std::byte* memory) const {
  const int64_t group = step_.group_;
  const int64_t blocks = sequence.num_blocks;
  pair.sequence = &sequence;
  pair.head = head;
  pair.high = 0x10000;
  pair.budget = 1.0 - step_.options_.mass;
  pair.weights = carve<uint16_t>(memory, blocks * kIndexBlock * group);
  pair.keys = carve<uint16_t>(memory, blocks * kIndexBlock);
  pair.bins = carve<uint32_t>(memory, (blocks + 1) * kBins);
  pair.histogram = pair.bins + kBins;
  pair.sum = carve<float>(memory, group * blocks);
  pair.rest = carve<float>(memory, group * blocks);
  pair.before = carve<float>(memory, group * blocks);
  pair.now = carve<float>(memory, group * blocks);
  pair.scale = carve<float>(memory, 2 * step_.chunks_ * blocks);
  pair.reference = carve<float>(memory, group);
  pair.true_reference = carve<float>(memory, group);
  pair.factor = carve<float>(memory, group);
  pair.total = carve<float>(memory, group);
  pair.margin = carve<float>(memory, group);
  pair.tail = carve<float>(memory, group);
  pair.slices = carve<Slice>(memory, blocks + 1);
  pair.out = carve<float>(memory, (blocks + 2) * group * step_.step_.layout_.head_dim);
  pair.lse = carve<float>(memory, (blocks + 2) * group);
}

const std::byte* MassStep::Work::query(const Pair& pair) const {
  const Layout& layout = step_.step_.layout_;
  const int64_t row = rows_ == Rows::step ? pair.sequence->query : pair.sequence - step_.foretold_.data();
  return queries_.q + (row * queries_.q_stride + int64_t{pair.head} * step_.group_ * layout.head_dim) *
                          dtype_bytes(layout.dtype);
}

void MassStep::Work::deal(int32_t total, int32_t* num_items) const {
  const int32_t num_groups = step_.step_.pool_.num_groups();
  for (int32_t i = 0; i < num_groups; ++i) num_items[i] = (total + num_groups - 1 - i) / num_groups;
}

ScanTask MassStep::Work::scan_task(const Pair& pair, std::byte*& scratch) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = *pair.sequence;
  const int64_t piece_bytes = layout.page_size / kIndexGroup * index_group_bytes(layout.head_dim);
  std::byte* memory = carve<std::byte>(scratch, index_query_bytes(step_.group_, layout.head_dim));
  ScanTask task{};
  task.index = step_.step_.index_.k + (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * piece_bytes;
  task.page_stride = step_.step_.index_.k_stride;
  task.block_table = sequence.pages;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_tokens = sequence.num_tokens;
  task.num_sinks = sequence.num_sinks;
  task.query = step_.kernels_.prepare[static_cast<int>(layout.dtype)](query(pair), step_.group_, layout.head_dim,
                                                                      step.scale_, queries_.soft_cap, memory);
  task.num_blocks = sequence.num_blocks;
  task.reference = pair.reference;
  task.weights = pair.weights;
  task.sum = pair.sum;
  task.scale = pair.scale;
  return task;
}

void MassStep::Work::scan(Pair& pair, int32_t begin, int32_t end, Worker& worker) const {
  std::byte* scratch = worker.scratch();
  ScanTask task = scan_task(pair, scratch);
  task.block_begin = begin;
  task.block_end = end;
  Reading reading(step_.step_.memory_);
  count_index(reading, pair, begin * kIndexBlock, std::min(end * kIndexBlock, task.num_tokens), 1);
  step_.kernels_.scan(task, scratch);
  const int64_t tokens = std::min(end * kIndexBlock, task.num_tokens) - begin * kIndexBlock;
  worker.count_bytes(queries_.layer, tokens * index_group_bytes(task.head_dim) / kIndexGroup);
}

// Of tokens [begin, end) one in `stride` is read.
void MassStep::Work::count_index(Reading& reading, const Pair& pair, int32_t begin, int32_t end, int32_t stride) const {
  if (!reading.counts()) return;
  const Layout& layout = step_.step_.layout_;
  const int64_t token_bytes = index_group_bytes(layout.head_dim) / kIndexGroup;
  for (int32_t token = begin; token < end;) {
    const int32_t page = token / layout.page_size;
    const int32_t next = std::min((page + 1) * layout.page_size, end);
    reading.add(Role::index, pair.sequence->pages[page], (next - token) * token_bytes / stride);
    token = next;
  }
}

// Tokens whose keys and values are read: a list, or `num` in a row from `first`.
void MassStep::Work::count_tokens(Reading& reading, const Pair& pair, const int32_t* tokens, int32_t first,
                                  int32_t num) const {
  if (!reading.counts()) return;
  const Step& step = step_.step_;
  const int32_t page_size = step.layout_.page_size;
  const int64_t row_bytes = step.layout_.head_dim * dtype_bytes(step.layout_.dtype);
  const bool has_heat = step.memory_->has_heat();
  if (!has_heat && step.memory_->num_nodes() == 1 && num > 0) {  // wherever they lie
    return reading.add(Role::k, pair.sequence->pages[0], 2 * num * row_bytes);
  }
  for (int32_t i = 0; i < num;) {
    const int32_t page = (tokens == nullptr ? first + i : tokens[i]) / page_size;
    float mass = 0;
    int32_t count = 0;
    for (; i < num; ++i, ++count) {
      const int32_t token = tokens == nullptr ? first + i : tokens[i];
      if (token >= (page + 1) * page_size) break;
      if (has_heat && pair.estimated && token < pair.sequence->num_tokens) mass += score_of(pair, token);
    }
    const int32_t id = pair.sequence->pages[page];
    reading.add(Role::k, id, count * row_bytes);
    reading.add(Role::v, id, count * row_bytes);
    if (has_heat) step.memory_->heat(id, mass, static_cast<float>(count));
  }
}

// A token's softmax probability by the estimates, averaged over the query heads.
float MassStep::Work::score_of(const Pair& pair, int32_t token) const {
  const uint32_t key = pair.keys[token / kIndexUnit * kIndexUnit + place_in_unit(token % kIndexUnit)];
  if (key != kAlways) return std::bit_cast<float>(key << 16);
  // What is attended in any case has no key of its own.
  const int32_t unit = token / kIndexUnit;
  float score = 0;
  for (int32_t row = 0; row < step_.group_; ++row) {
    const uint32_t bits = pair.weights[(int64_t{unit} * step_.group_ + row) * kIndexUnit + place_in_unit(token % kIndexUnit)];
    score += std::bit_cast<float>(bits << 16) * pair.factor[row];
  }
  return score;
}

// After the scan: what a weight is worth, and how far the estimates are to be trusted.
void MassStep::Work::weigh(Pair& pair, std::byte* scratch) const {
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

void MassStep::Work::score(Pair& pair, int32_t begin, int32_t end, std::byte* scratch) const {
  const Sequence& sequence = *pair.sequence;
  const ScoreTask task{step_.group_, sequence.num_tokens, sequence.num_sinks, sequence.always_begin, begin, end,
                       pair.weights, pair.factor, pair.keys, pair.histogram};
  step_.kernels_.score(task, scratch);
}

// After the scores, and again for each widening: which keys are attended next, and in which slices.
void MassStep::Work::choose(Pair& pair) const {
  const Sequence& sequence = *pair.sequence;
  const int32_t num_blocks = sequence.num_blocks;
  pair.num_slices = 0;
  if (pair.round == 0 && sequence.newest >= 0) pair.slices[pair.num_slices++] = {0, 0, 1, sequence.newest};
  if (pair.estimated && pair.round == 0) {
    std::fill_n(pair.bins, kBins, 0u);
    for (int32_t block = 0; block < num_blocks; ++block) {
      for (int32_t bin = 0; bin < kBins; ++bin) pair.bins[bin] += pair.histogram[int64_t{block} * kBins + bin];
    }
    pair.low = find_threshold(pair.bins, pair.budget);
    int64_t selected = 0;
    for (int32_t bin = bin_of(pair.low); bin < kBins; ++bin) selected += pair.bins[bin];
    pair.dense = static_cast<double>(selected) > kFullShare * sequence.num_tokens;
  }
  if (!pair.estimated || pair.dense) {
    pair.dense = true;
    for (int32_t block = 0; block < num_blocks; ++block) {
      const int32_t first = block * kIndexBlock;
      pair.slices[pair.num_slices++] = {block, block + 1, std::min(sequence.num_tokens - first, kIndexBlock), first};
    }
    return;
  }
  Slice slice{0, 0, 0, -1};
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
      slice = {slice.end, slice.end, 0, -1};
    }
  }
}

// ---- a layer ahead ----

MassStep::Foretelling::Foretelling(const MassStep& step, const Step::Queries& queries)
    : Work(step, queries, Rows::scanned) {
  const auto num_pairs = static_cast<int32_t>(step.foretold_memory_.size());
  const int32_t num_kv_heads = step.step_.layout_.num_kv_heads;
  const int64_t pair_bytes = round_up(num_pairs * static_cast<int64_t>(sizeof(Pair)));
  buffer_.reserve(pair_bytes + step.foretold_bytes_ + 64);
  pairs_ = reinterpret_cast<Pair*>(buffer_.data());
  for (int32_t i = 0; i < num_pairs; ++i) {
    Pair& pair = *new (pairs_ + i) Pair{};
    bind(pair, step.foretold_[i / num_kv_heads], i % num_kv_heads, buffer_.data() + pair_bytes + step.foretold_memory_[i]);
    pair.budget *= kForetoldBudget;
  }
}

// 0: scan; 1: score.
void MassStep::Foretelling::begin_phase(int32_t phase, int32_t* num_items) {
  if (phase >= 2) return deal(0, num_items);
  for (const Item& item : step_.foretold_items_) pairs_[item.pair].pending.store(0, std::memory_order_relaxed);
  for (const Item& item : step_.foretold_items_) pairs_[item.pair].pending.fetch_add(1, std::memory_order_relaxed);
  deal(static_cast<int32_t>(step_.foretold_items_.size()), num_items);
}

void MassStep::Foretelling::run_item(int32_t phase, int32_t group_index, int32_t item_index, Worker& worker) {
  const Item& item = step_.foretold_items_[item_index * step_.step_.pool_.num_groups() + group_index];
  Pair& pair = pairs_[item.pair];
  if (phase == 0) {
    scan(pair, item.begin, item.end, worker);
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) weigh(pair, worker.scratch());
  } else {
    if (pair.estimated) score(pair, item.begin, item.end, worker.scratch());
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) choose(pair);
  }
}

// ---- attention ----

MassStep::Attend::Attend(const MassStep& step, const Step::Queries& queries, std::shared_ptr<Foretelling> foretelling)
    : Work(step, queries, Rows::step), foretelling_(std::move(foretelling)) {
  if (!step.others_->items.empty()) others_ = std::make_unique<Step::Attend>(step.step_, *step.others_, queries);
  num_other_items_ = static_cast<int32_t>(step.others_->items.size()) * step.step_.layout_.num_kv_heads;
  const auto num_pairs = static_cast<int32_t>(step.memory_.size());
  const int32_t num_kv_heads = step.step_.layout_.num_kv_heads;
  const int64_t pair_bytes = round_up(num_pairs * static_cast<int64_t>(sizeof(Pair)));
  buffer_.reserve(pair_bytes + (foretelling_ == nullptr ? step.job_bytes_ : 0) + 64);
  pairs_ = reinterpret_cast<Pair*>(buffer_.data());
  for (int32_t i = 0; i < num_pairs; ++i) {
    Pair& pair = *new (pairs_ + i) Pair{};
    if (step.memory_[i] < 0 || foretelling_ != nullptr) continue;
    bind(pair, step.sequences_[i / num_kv_heads], i % num_kv_heads, buffer_.data() + pair_bytes + step.memory_[i]);
  }
  size_t most = 0;
  if (foretelling_ == nullptr) {
    for (const Item& item : step.cut_items_) {
      pairs_[item.pair].pending.fetch_add(1, std::memory_order_relaxed);
      most += static_cast<size_t>(item.end - item.begin) + 1;
    }
    items_.reserve(most);
    return;
  }
  // Slices of what was selected, and samples of what was not.
  for (int32_t i = 0; i < num_pairs; ++i) {
    Pair& pair = foretelling_->pairs_[i];
    const int32_t num_slices = pair.num_slices;
    for (int32_t slice = 0; slice < num_slices; ++slice) items_.push_back({i, slice, slice});
    pair.pending.store(num_slices, std::memory_order_relaxed);
  }
  for (const Item& item : step.foretold_items_) {
    Pair& pair = foretelling_->pairs_[item.pair];
    if (pair.dense) continue;
    items_.push_back(item);
    pair.pending.fetch_add(1, std::memory_order_relaxed);
  }
}

// What is to be done in a phase: 0 scan (and whatever is not cut), 1 score, 2 attend, 3 and on attend more. After a
// foretelling: 0 attend and verify, 1 all over again for what did not hold.
void MassStep::Attend::begin_phase(int32_t phase, int32_t* num_items) {
  const auto num_pairs = static_cast<int32_t>(step_.memory_.size());
  int32_t total = 0;
  if (foretelling_ != nullptr) {
    if (phase == 1) {
      items_.clear();
      for (int32_t i = 0; i < num_pairs; ++i) {
        if (foretelling_->pairs_[i].failed) items_.push_back({i, 0, 0});
      }
    }
    total = phase == 0 ? num_other_items_ + static_cast<int32_t>(items_.size())
                       : phase == 1 ? static_cast<int32_t>(items_.size()) : 0;
  } else if (phase == 0) {
    total = num_other_items_ + static_cast<int32_t>(step_.items_.size());
  } else if (phase == 1) {
    for (const Item& item : step_.cut_items_) pairs_[item.pair].pending.store(0, std::memory_order_relaxed);
    for (const Item& item : step_.cut_items_) pairs_[item.pair].pending.fetch_add(1, std::memory_order_relaxed);
    total = static_cast<int32_t>(step_.cut_items_.size());
  } else if (!step_.cut_items_.empty()) {
    items_.clear();
    for (int32_t i = 0; i < num_pairs; ++i) {
      Pair& pair = pairs_[i];
      if (step_.memory_[i] < 0 || pair.num_slices == 0) continue;
      pair.pending.store(pair.num_slices, std::memory_order_relaxed);
      for (int32_t slice = 0; slice < pair.num_slices; ++slice) items_.push_back({i, slice, slice});
    }
    total = static_cast<int32_t>(items_.size());
  }
  if (total == 0) {
    MassStats& stats = step_.record_.layers[static_cast<size_t>(queries_.layer)];
    for (int32_t i = 0; i < num_pairs; ++i) {
      stats.add(pairs_[i].stats);
      if (foretelling_ != nullptr) stats.add(foretelling_->pairs_[i].stats);
    }
  }
  deal(total, num_items);
}

void MassStep::Attend::run_item(int32_t phase, int32_t group_index, int32_t item_index, Worker& worker) {
  const int32_t index = item_index * step_.step_.pool_.num_groups() + group_index;
  if (phase == 0 && index < num_other_items_) return others_->run_item(0, group_index, item_index, worker);
  if (foretelling_ != nullptr) {
    const Item& item = items_[phase == 0 ? index - num_other_items_ : index];
    if (phase == 1) return run_pair(item.pair, worker);
    Pair& pair = foretelling_->pairs_[item.pair];
    if (item.begin == item.end) {
      attend(pair, item.begin, worker);
    } else {
      verify(pair, item.begin, item.end, worker);
    }
    if (pair.pending.fetch_sub(1, std::memory_order_acq_rel) == 1) finish_foretold(pair, worker.scratch());
  } else if (phase == 0) {
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
  const int32_t num_kv_heads = step_.step_.layout_.num_kv_heads;
  const Sequence& sequence = step_.sequences_[number / num_kv_heads];
  Pair& pair = pairs_[number];
  std::byte* scratch = worker.scratch();
  // Behind what the steps below need for themselves.
  bind(pair, sequence, number % num_kv_heads, scratch + step_.scratch_bytes_ - step_.memory_bytes(sequence.num_blocks));
  scan(pair, 0, sequence.num_blocks, worker);
  weigh(pair, scratch);
  if (pair.estimated) score(pair, 0, sequence.num_blocks, scratch);
  choose(pair);
  do {
    for (int32_t i = 0; i < pair.num_slices; ++i) attend(pair, i, worker);
  } while (!finish(pair));
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
  int32_t begin = 0;
  int32_t end = slice.count;
  if (slice.first >= 0) {
    const int32_t num_tokens = std::max(sequence.num_tokens, sequence.newest + 1);
    task.num_keys = ceil_div(num_tokens, layout.page_size) * layout.page_size;
    begin = slice.first;
    end = begin + slice.count;
  } else {
    int32_t* tokens = carve<int32_t>(scratch, slice.count + 16);
    const PickTask pick{step_.group_, sequence.num_blocks, sequence.num_tokens, slice.begin, slice.end, pair.low, pair.high,
                        pair.weights, pair.keys, tokens, pair.rest};
    step_.kernels_.pick(pick, scratch);
    task.selected = tokens;
    task.num_keys = slice.count;
  }
  if (slice.count == 0) {
    std::fill_n(lse, group, -kInfinity);
    return;
  }
  const int64_t bytes = dtype_bytes(layout.dtype);
  const int64_t offset = (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * layout.head_elements() * bytes;
  task.k = step.k_pages_ + offset;
  task.v = step.v_pages_ + offset;
  task.page_stride = layout.page_stride;
  task.pages = sequence.pages;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_queries = 1;
  task.group = step_.group_;
  task.begin = &begin;
  task.end = &end;
  task.scale = step.scale_;
  task.soft_cap = queries_.soft_cap;
  task.q = query(pair);
  task.q_stride = queries_.q_stride;
  task.block_begin = begin / kBlockTokens;
  task.block_end = ceil_div(end, kBlockTokens);
  task.out = pair.out + (number + 1) * group * layout.head_dim;
  task.out_float32 = true;
  task.lse = lse;
  Reading reading(step.memory_);
  count_tokens(reading, pair, task.selected, slice.first, slice.count);
  step.pool_.kernels().attend[static_cast<int>(layout.dtype)](task, scratch);
  worker.count_bytes(queries_.layer, 2 * int64_t{slice.count} * layout.head_dim * bytes);
}

// Part of the rest by the foretold query and by the true one.
void MassStep::Attend::verify(Pair& pair, int32_t begin, int32_t end, Worker& worker) const {
  std::byte* scratch = worker.scratch();
  VerifyTask task{};
  task.scan = scan_task(pair, scratch);
  task.scan.block_begin = begin;
  task.scan.block_end = end;
  task.scan.reference = pair.true_reference;
  task.low = pair.low;
  task.keys = pair.keys;
  task.weights = pair.weights;
  task.before = pair.before;
  task.now = pair.now;
  Reading reading(step_.step_.memory_);
  count_index(reading, pair, begin * kIndexBlock, std::min(end * kIndexBlock, task.scan.num_tokens), kVerifyStride);
  step_.kernels_.verify(task, scratch);
  const int64_t tokens = std::min(end * kIndexBlock, task.scan.num_tokens) - begin * kIndexBlock;
  worker.count_bytes(queries_.layer, tokens * index_group_bytes(task.scan.head_dim) / kIndexGroup / kVerifyStride);
}

// The slices' results, and what was attended before, into one.
void MassStep::Attend::fold(Pair& pair) const {
  const int32_t group = step_.group_;
  const int32_t head_dim = step_.step_.layout_.head_dim;
  const int32_t first = pair.round == 0 ? 1 : 0;
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
    pair.lse[row] = shift + std::log(total);

    float rest = 0;
    if (!pair.dense) {
      for (int32_t block = 0; block < pair.sequence->num_blocks; ++block) {
        rest += pair.rest[int64_t{row} * pair.sequence->num_blocks + block];
      }
    }
    pair.tail[row] = rest > 0 ? pair.total[row] + std::log(rest * pair.factor[row] * static_cast<float>(group)) : -kInfinity;
  }
  for (int32_t i = 0; i < pair.num_slices; ++i) pair.stats.attended += pair.slices[i].count;
}

// After the last slice: adds up, measures, and writes the result or chooses what else to attend.
bool MassStep::Attend::finish(Pair& pair) const {
  fold(pair);
  const bool complete = pair.dense || pair.low == 0;
  if (!complete && !(pair.lowest_mass(step_.group_, 0.0f) >= step_.options_.floor)) {  // NaN: everything, and says so
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
  pair.num_slices = 0;
  close(pair, complete);
  return true;
}

// After the last slice and sample: what was left out, by the true query.
void MassStep::Attend::finish_foretold(Pair& pair, std::byte* scratch) const {
  fold(pair);
  const int32_t group = step_.group_;
  const int32_t num_blocks = pair.sequence->num_blocks;
  pair.stats.foretold = 1;
  if (!pair.dense) {
    const IndexQuery query = scan_task(pair, scratch).query;
    bool held = is_estimable(query, num_blocks, pair.now, pair.scale);
    for (int32_t row = 0; row < group && held; ++row) {
      float before = 0;
      float now = 0;
      for (int32_t block = 0; block < num_blocks; ++block) {
        before += pair.before[int64_t{row} * num_blocks + block];
        now += pair.now[int64_t{row} * num_blocks + block];
      }
      if (before > 0) {
        pair.tail[row] += (pair.true_reference[row] - pair.reference[row]) * kLog2 + std::log(now / before);
      }
    }
    held = held && pair.lowest_mass(group, kSampleDoubt) >= step_.options_.floor;
    if (!held) {
      pair.failed = true;
      pair.stats = {};
      pair.stats.foretold = pair.stats.rescanned = 1;
      return;
    }
  }
  close(pair, pair.dense || pair.low == 0);
}

// Notes what was retained, and writes the result.
void MassStep::Attend::close(Pair& pair, bool complete) const {
  const Step& step = step_.step_;
  const Layout& layout = step.layout_;
  const Sequence& sequence = *pair.sequence;
  const int32_t group = step_.group_;
  const int32_t head_dim = layout.head_dim;
  pair.stats.count = group;
  pair.stats.scanned = std::max(sequence.num_tokens, sequence.newest + 1);
  pair.stats.full = complete;
  bool has_tail = false;
  for (int32_t row = 0; row < group; ++row) {
    const double mass = complete ? 1.0 : pair.retained_mass(row, 0.0f);
    pair.stats.sum += mass;
    pair.stats.minimum = std::min(pair.stats.minimum, mass);
    has_tail |= !complete && pair.tail[row] > -kInfinity;
  }

  const int32_t full_pages = sequence.num_tokens / layout.page_size;
  const bool tail = step_.options_.tail && has_tail && full_pages > 0;
  float mean[kMaxHeadDim] = {};
  if (tail) {
    const int32_t stride = ceil_div(full_pages, kSampledPages);
    const int32_t pages = ceil_div(full_pages, stride);
    const float* v_sum = step_.step_.index_.v_sum + (int64_t{queries_.layer} * layout.num_kv_heads + pair.head) * head_dim;
    Reading reading(step.memory_);
    for (int32_t page = 0; page < full_pages; page += stride) {
      reading.add(Role::v_sums, sequence.pages[page], int64_t{head_dim} * 4);
      const float* sums = v_sum + sequence.pages[page] * step_.step_.index_.v_sum_stride;
      for (int32_t d = 0; d < head_dim; ++d) mean[d] += sums[d];
    }
    for (int32_t d = 0; d < head_dim; ++d) mean[d] /= static_cast<float>(pages * layout.page_size);
  }
  for (int32_t row = 0; row < group; ++row) {
    const int32_t head = pair.head * group + row;
    float* out = reinterpret_cast<float*>(queries_.out) + sequence.query * queries_.out_stride + int64_t{head} * head_dim;
    const float* attended = pair.out + int64_t{row} * head_dim;
    const float weight = tail ? std::exp(pair.tail[row] - pair.lse[row]) : 0.0f;  // of the rest; 1 for what was attended
    for (int32_t d = 0; d < head_dim; ++d) {
      out[d] = weight > 0 ? (attended[d] + mean[d] * weight) / (1.0f + weight) : attended[d];
    }
    queries_.lse[int64_t{sequence.query} * step.num_heads_ + head] = pair.lse[row] + std::log1p(weight);
  }
}

}  // namespace hybridgen
