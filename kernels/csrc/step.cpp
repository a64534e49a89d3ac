#include "step.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace hybridgen {
namespace {

// Waking a thread costs some microseconds: below this, the submitter is done before the others are there.
constexpr double kAloneSeconds = 10e-6;
constexpr double kBytesPerSecond = 15e9;  // of one thread, rough
constexpr double kFlopsPerSecond = 80e9;

constexpr int32_t kStoreTokens = 64;  // to one item
constexpr int32_t kSmallRows = 16;    // up to here a tile takes the time of reading its KV, and is cut
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;

int32_t ceil_div(int32_t a, int32_t b) { return (a + b - 1) / b; }

std::string at(int32_t seq) { return " (sequence " + std::to_string(seq) + ")"; }

}  // namespace

Step::Step(Pool& pool, const Layout& layout, std::byte* k_pages, std::byte* v_pages, int32_t first_page,
           int32_t num_pages, int32_t total_pages, int32_t num_seqs, const int32_t* query_begin, const int32_t* kv_len,
           const int32_t* block_table, int64_t max_pages, int32_t num_heads, float scale)
    : pool_(pool),
      layout_(layout),
      k_pages_(k_pages),
      v_pages_(v_pages),
      num_heads_(num_heads),
      scale_(scale),
      query_begin_(query_begin, query_begin + num_seqs + 1),
      kv_len_(kv_len, kv_len + num_seqs) {
  if (layout.page_size <= 0 || layout.page_size % kGroupTokens != 0) {
    throw std::invalid_argument("page_size " + std::to_string(layout.page_size) + " is not a multiple of 16");
  }
  if (layout.head_dim <= 0 || layout.head_dim % 2 != 0 || layout.head_dim > kMaxHeadDim) {
    throw std::invalid_argument("head_dim " + std::to_string(layout.head_dim) + " is not an even number up to 512");
  }
  if (num_heads <= 0 || num_heads % layout.num_kv_heads != 0) {
    throw std::invalid_argument(std::to_string(num_heads) + " query heads do not share " +
                                std::to_string(layout.num_kv_heads) + " KV heads evenly");
  }
  if (layout.page_stride < layout.head_elements() * layout.num_kv_heads * layout.num_layers) {
    throw std::invalid_argument("pages " + std::to_string(layout.page_stride) + " elements apart overlap");
  }
  if (!(scale > 0.0f)) throw std::invalid_argument("scale must be positive");
  if (query_begin_[0] != 0) throw std::invalid_argument("query_begin must begin with 0");
  for (int32_t seq = 0; seq < num_seqs; ++seq) {
    const int32_t num_queries = query_begin_[seq + 1] - query_begin_[seq];
    if (num_queries < 0) throw std::invalid_argument("query_begin must not decrease" + at(seq));
    if (kv_len_[seq] < 0) throw std::invalid_argument("kv_len must not be negative" + at(seq));
    const int32_t used = ceil_div(kv_len_[seq], layout.page_size);
    if (used > max_pages) {
      throw std::invalid_argument("kv_len " + std::to_string(kv_len_[seq]) + " needs " + std::to_string(used) +
                                  " pages but block_table has " + std::to_string(max_pages) + at(seq));
    }
    const int32_t* table = block_table + seq * max_pages;
    pages_begin_.push_back(static_cast<int64_t>(pages_.size()));
    before_begin_.push_back(static_cast<int64_t>(before_.size()));
    int32_t num_before = 0;
    for (int32_t i = 0; i < used; ++i) {
      if (table[i] < 0 || table[i] >= total_pages) {
        throw std::invalid_argument("page " + std::to_string(table[i]) + " is not in [0, " +
                                    std::to_string(total_pages) + ")" + at(seq));
      }
      before_.push_back(num_before);
      if (table[i] < first_page || table[i] >= first_page + num_pages) continue;
      pages_.push_back(table[i] - first_page);
      ++num_before;
    }
    before_.push_back(num_before);
    const int32_t* before = before_.data() + before_begin_.back();
    const int32_t* pages = pages_.data() + pages_begin_.back();
    for (int32_t i = 0; i < num_queries; ++i) {
      const int32_t position = kv_len_[seq] - num_queries + i;
      const int32_t page = position / layout.page_size;
      const bool here = position >= 0 && before[page + 1] > before[page];
      slots_.push_back(here ? int64_t{pages[before[page]]} * layout.page_size + position % layout.page_size : -1);
      key_end_.push_back(key_at(seq, position + 1));
      if (here && (position + 1) % layout.page_size == 0) filled_.push_back(static_cast<int32_t>(slots_.size()) - 1);
    }
  }
  pages_begin_.push_back(static_cast<int64_t>(pages_.size()));
}

// How many of the sequence's tokens before `position` lie on this tier. 0 <= position <= kv_len, less gives 0.
int32_t Step::key_at(int32_t seq, int32_t position) const {
  if (position <= 0) return 0;
  const int32_t* before = before_.data() + before_begin_[seq];
  const int32_t page = position / layout_.page_size;
  const int32_t offset = position % layout_.page_size;
  if (offset == 0) return before[page] * layout_.page_size;
  return before[page] * layout_.page_size + (before[page + 1] > before[page] ? offset : 0);
}

void Step::check_layer(int32_t layer) const {
  if (layer < 0 || layer >= layout_.num_layers) {
    throw std::invalid_argument("layer " + std::to_string(layer) + " is not in [0, " +
                                std::to_string(layout_.num_layers) + ")");
  }
}

void Step::count(Reading& reading, Role role, const int32_t* pages, int32_t begin, int32_t end) const {
  if (!reading.counts()) return;
  const int64_t row_bytes = layout_.head_dim * dtype_bytes(layout_.dtype);
  for (int32_t key = begin; key < end;) {
    const int32_t page = key / layout_.page_size;
    const int32_t next = std::min((page + 1) * layout_.page_size, end);
    reading.add(role, pages[page], (next - key) * row_bytes);
    key = next;
  }
}

// Tokens [begin, end) are read in full by one KV head; what mass they hold is not known.
void Step::heat(const int32_t* pages, int32_t begin, int32_t end) const {
  if (memory_ == nullptr || !memory_->has_heat()) return;
  for (int32_t key = begin; key < end;) {
    const int32_t page = key / layout_.page_size;
    const int32_t next = std::min((page + 1) * layout_.page_size, end);
    memory_->heat(pages[page], 0.0f, static_cast<float>(next - key));
    key = next;
  }
}

void Step::store_tokens(int32_t layer, const std::byte* k, int64_t k_stride, const std::byte* v, int64_t v_stride,
                        int32_t begin, int32_t end) const {
  const int64_t bytes = dtype_bytes(layout_.dtype);
  const int64_t head_bytes = layout_.head_elements() * bytes;
  const int64_t row_bytes = layout_.head_dim * bytes;
  const int64_t layer_bytes = head_bytes * layout_.num_kv_heads * layer;
  for (int32_t token = begin; token < end; ++token) {
    if (slots_[token] < 0) continue;
    const int64_t page = slots_[token] / layout_.page_size;
    const int64_t begin = page * layout_.page_stride * bytes + layer_bytes;
    const auto offset = static_cast<int32_t>(slots_[token] % layout_.page_size);
    for (int32_t head = 0; head < layout_.num_kv_heads; ++head) {
      const std::byte* k_in = k + (token * k_stride + int64_t{head} * layout_.head_dim) * bytes;
      const std::byte* v_in = v + (token * v_stride + int64_t{head} * layout_.head_dim) * bytes;
      const int64_t out = begin + head * head_bytes + offset * row_bytes;
      std::byte* k_out = k_pages_ + out;
      std::byte* v_out = v_pages_ + out;
      std::memcpy(k_out, k_in, static_cast<size_t>(row_bytes));
      std::memcpy(v_out, v_in, static_cast<size_t>(row_bytes));
      if (index_.k == nullptr) continue;
      const int64_t piece = int64_t{layer} * layout_.num_kv_heads + head;
      index_kernels_->quantize[static_cast<int>(layout_.dtype)](
          k_out, layout_.head_dim, 1, offset, layout_.head_dim,
          index_.k + page * index_.k_stride + piece * (layout_.page_size / kIndexGroup) * index_group_bytes(layout_.head_dim));
    }
  }
}

// Of the page that this token fills.
void Step::sum_pages(int32_t layer, int32_t token) const {
  const int64_t page = slots_[token] / layout_.page_size;
  for (int32_t head = 0; head < layout_.num_kv_heads; ++head) {
    const int64_t piece = int64_t{layer} * layout_.num_kv_heads + head;
    const int64_t values = page * layout_.page_stride + piece * layout_.head_elements();
    index_kernels_->sum_page[static_cast<int>(layout_.dtype)](
        v_pages_ + values * dtype_bytes(layout_.dtype), layout_.page_size, layout_.head_dim,
        index_.v_sum + page * index_.v_sum_stride + piece * layout_.head_dim);
  }
}

void Step::store(int32_t layer, const std::byte* k, int64_t k_stride, const std::byte* v, int64_t v_stride) {
  check_layer(layer);
  struct Call {
    const Step& step;
    int32_t layer;
    const std::byte* k;
    int64_t k_stride;
    const std::byte* v;
    int64_t v_stride;
    int32_t num_tokens;
  };
  const Call call{*this, layer, k, k_stride, v, v_stride, static_cast<int32_t>(slots_.size())};
  const int64_t bytes =
      int64_t{2} * call.num_tokens * layout_.num_kv_heads * layout_.head_dim * dtype_bytes(layout_.dtype);
  pool_.run(
      ceil_div(call.num_tokens, kStoreTokens),
      [](const void* context, int32_t item, std::byte*) {
        const Call& c = *static_cast<const Call*>(context);
        c.step.store_tokens(c.layer, c.k, c.k_stride, c.v, c.v_stride, item * kStoreTokens,
                            std::min(c.num_tokens, (item + 1) * kStoreTokens));
      },
      &call, 0, bytes < (int64_t{128} << 10));
  if (index_.k == nullptr) return;
  pool_.run(  // a page's tokens may have been stored by several items
      static_cast<int32_t>(filled_.size()),
      [](const void* context, int32_t item, std::byte*) {
        const Call& c = *static_cast<const Call*>(context);
        c.step.sum_pages(c.layer, c.step.filled_[static_cast<size_t>(item)]);
      },
      &call, 0, bytes < (int64_t{128} << 10));
}

void Step::check(const Queries& queries) const {
  check_layer(queries.layer);
  if (queries.sliding_window < 0) throw std::invalid_argument("sliding_window must not be negative");
  if (!(queries.soft_cap >= 0.0f)) throw std::invalid_argument("soft_cap must not be negative");
}

const Step::Plan& Step::plan(const Queries& queries) {
  check(queries);
  std::lock_guard<std::mutex> lock(plans_mutex_);
  for (const auto& plan : plans_) {
    if (plan->sliding_window == queries.sliding_window) return *plan;
  }
  plans_.push_back(make_plan(queries.sliding_window, {}));
  return *plans_.back();
}

std::unique_ptr<Step::Plan> Step::make_plan(int32_t sliding_window, const std::vector<char>& skip) const {
  auto plan = std::make_unique<Plan>();
  plan->sliding_window = sliding_window;
  const int32_t group = num_heads_ / layout_.num_kv_heads;
  const int32_t tile_queries = std::max(1, kTileRows / group);
  for (int32_t seq = 0; seq < static_cast<int32_t>(kv_len_.size()); ++seq) {
    const int32_t begin = query_begin_[seq];
    const int32_t end = query_begin_[seq + 1];
    for (int32_t query = begin; query < end; ++query) {
      const int32_t after = kv_len_[seq] - end + query + 1;
      plan->begin.push_back(sliding_window > 0 ? key_at(seq, after - sliding_window) : 0);
    }
    if (!skip.empty() && skip[seq]) continue;
    for (int32_t query = begin; query < end; query += tile_queries) {
      Tile tile{};
      tile.seq = seq;
      tile.query = query;
      tile.num_queries = std::min(tile_queries, end - query);
      tile.block_end = ceil_div(key_end_[query + tile.num_queries - 1], kBlockTokens);
      tile.block_begin = std::min(plan->begin[query] / kBlockTokens, tile.block_end);
      tile.partial = -1;
      plan->tiles.push_back(tile);
    }
  }

  // Cutting a tile into blocks changes no bit of its result, so it is a matter of time and memory alone.
  const bool few = plan->tiles.size() * layout_.num_kv_heads < size_t(4 * pool_.num_threads());
  int64_t num_blocks = 0;
  for (const Tile& tile : plan->tiles) num_blocks += int64_t{tile.block_end - tile.block_begin} * layout_.num_kv_heads;
  // Some blocks in a row to an item, so that one's end prefetches the next one's beginning, while items are plenty.
  const auto run_blocks = static_cast<int32_t>(std::clamp<int64_t>(num_blocks / (8 * pool_.num_threads()), 1, 8));
  double seconds = 0;
  int64_t floats = 0;
  int32_t most_rows = 1;
  for (size_t i = 0; i < plan->tiles.size(); ++i) {
    Tile& tile = plan->tiles[i];
    const int32_t rows = tile.num_queries * group;
    most_rows = std::max(most_rows, rows);
    const int32_t blocks = tile.block_end - tile.block_begin;
    const int64_t tile_floats = partial_floats(rows, layout_.head_dim) * blocks;
    const bool cut = pool_.num_threads() > 1 && blocks > run_blocks &&
                     (rows <= kSmallRows || (few && floats + tile_floats * layout_.num_kv_heads < kMaxPartialFloats));
    tile.pending = 1;
    const int32_t step = cut ? run_blocks : std::max(1, blocks);
    if (cut) {
      tile.partial = floats;
      tile.pending = ceil_div(blocks, step);
      floats += tile_floats * layout_.num_kv_heads;
    }
    const int32_t key_end = key_end_[tile.query + tile.num_queries - 1];
    for (int32_t block = tile.block_begin; block == tile.block_begin || block < tile.block_end; block += step) {
      const int32_t block_end = std::min(block + step, tile.block_end);
      const double keys = std::max(0, std::min(key_end, block_end * kBlockTokens) - block * kBlockTokens);
      const double bytes = 2.0 * keys * layout_.head_dim * static_cast<double>(dtype_bytes(layout_.dtype));
      const double flops = 4.0 * keys * layout_.head_dim * rows;
      const double cost = bytes / kBytesPerSecond + flops / kFlopsPerSecond;
      seconds += cost * layout_.num_kv_heads;
      plan->items.push_back({static_cast<int32_t>(i), block, block_end, static_cast<float>(cost), static_cast<int64_t>(bytes)});
    }
  }
  std::stable_sort(plan->items.begin(), plan->items.end(),
                   [](const Item& a, const Item& b) { return a.cost > b.cost; });
  plan->alone = seconds < kAloneSeconds;
  plan->partial_floats = floats;
  plan->scratch_bytes = attend_scratch_bytes(most_rows, layout_.head_dim);
  return plan;
}

Step::Attend::Attend(const Step& step, const Plan& plan, const Queries& queries)
    : step_(step), plan_(plan), queries_(queries), buffer_(step.pool_.buffers.take()) {
  const int64_t num_pending = static_cast<int64_t>(plan.tiles.size()) * step.layout_.num_kv_heads;
  buffer_.reserve(plan.partial_floats * 4 + num_pending * static_cast<int64_t>(sizeof(std::atomic<int32_t>)));
  partials_ = reinterpret_cast<float*>(buffer_.data());
  pending_ = reinterpret_cast<std::atomic<int32_t>*>(buffer_.data() + plan.partial_floats * 4);
  for (int64_t i = 0; i < num_pending; ++i) {
    new (pending_ + i) std::atomic<int32_t>(plan.tiles[static_cast<size_t>(i / step.layout_.num_kv_heads)].pending);
  }
}

Step::Attend::~Attend() {
  wait();
  step_.pool_.buffers.give(std::move(buffer_));
}

// Items are dealt out to the groups in turn, so that each has as many dear ones.
void Step::Attend::begin_phase(int32_t phase, int32_t* num_items) {
  const int32_t num_groups = step_.pool_.num_groups();
  const auto total = phase == 0 ? static_cast<int32_t>(plan_.items.size()) * step_.layout_.num_kv_heads : 0;
  for (int32_t i = 0; i < num_groups; ++i) num_items[i] = (total + num_groups - 1 - i) / num_groups;
}

void Step::Attend::run_item(int32_t, int32_t group_index, int32_t item_index, Worker& worker) {
  const Layout& layout = step_.layout_;
  const int32_t num_kv_heads = layout.num_kv_heads;
  const int32_t group = step_.num_heads_ / num_kv_heads;
  const int32_t index = item_index * step_.pool_.num_groups() + group_index;
  const Item& item = plan_.items[index / num_kv_heads];
  const Tile& tile = plan_.tiles[item.tile];
  const int32_t head = index % num_kv_heads;
  const int64_t bytes = dtype_bytes(layout.dtype);
  const int64_t offset = (int64_t{queries_.layer} * num_kv_heads + head) * layout.head_elements() * bytes;
  const int64_t query_offset = int64_t{head} * group * layout.head_dim;
  const int64_t out_bytes = queries_.out_float32 ? 4 : bytes;

  AttendTask task{};
  task.k = step_.k_pages_ + offset;
  task.v = step_.v_pages_ + offset;
  task.page_stride = layout.page_stride;
  task.pages = step_.pages_.data() + step_.pages_begin_[tile.seq];
  task.num_keys = static_cast<int32_t>(step_.pages_begin_[tile.seq + 1] - step_.pages_begin_[tile.seq]) * layout.page_size;
  task.page_size = layout.page_size;
  task.head_dim = layout.head_dim;
  task.num_queries = tile.num_queries;
  task.group = group;
  task.begin = plan_.begin.data() + tile.query;
  task.end = step_.key_end_.data() + tile.query;
  task.scale = step_.scale_;
  task.soft_cap = queries_.soft_cap;
  task.q = queries_.q + (tile.query * queries_.q_stride + query_offset) * bytes;
  task.q_stride = queries_.q_stride;
  task.block_begin = item.block_begin;
  task.block_end = item.block_end;
  task.out = queries_.out + (tile.query * queries_.out_stride + query_offset) * out_bytes;
  task.out_stride = queries_.out_stride;
  task.out_float32 = queries_.out_float32;
  task.lse = queries_.lse == nullptr ? nullptr : queries_.lse + int64_t{tile.query} * step_.num_heads_ + head * group;
  task.lse_stride = step_.num_heads_;
  worker.count_bytes(queries_.layer, item.bytes);
  Reading reading(step_.memory_);
  const int32_t key_end =
      std::min(item.block_end * kBlockTokens, step_.key_end_[tile.query + tile.num_queries - 1]);
  step_.count(reading, Role::k, task.pages, item.block_begin * kBlockTokens, key_end);
  step_.count(reading, Role::v, task.pages, item.block_begin * kBlockTokens, key_end);
  step_.heat(task.pages, item.block_begin * kBlockTokens, key_end);
  const auto dtype = static_cast<int>(layout.dtype);
  if (tile.partial < 0) {
    step_.pool_.kernels().attend[dtype](task, worker.scratch());
    return;
  }
  const int64_t tile_floats =
      partial_floats(int64_t{tile.num_queries} * group, layout.head_dim) * (tile.block_end - tile.block_begin);
  task.partial = partials_ + tile.partial + head * tile_floats;
  task.partial_begin = tile.block_begin;
  step_.pool_.kernels().attend[dtype](task, worker.scratch());
  // Whoever finishes a tile's last block merges its blocks, in their order.
  if (pending_[int64_t{item.tile} * num_kv_heads + head].fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  task.block_begin = tile.block_begin;
  task.block_end = tile.block_end;
  step_.pool_.kernels().fold[dtype](task, worker.scratch());
}

void Step::attend(const Queries& queries) {
  const Plan& plan = this->plan(queries);
  Attend job(*this, plan, queries);
  pool_.run(job, plan.alone);
}

std::unique_ptr<Step::Attend> Step::submit(const Queries& queries) {
  const Plan& plan = this->plan(queries);
  auto job = std::make_unique<Attend>(*this, plan, queries);
  job->ticket_ = pool_.submit(*job, plan.alone);
  return job;
}

}  // namespace hybridgen
