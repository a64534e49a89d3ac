// One forward pass's attention: who attends to what, checked and shared out once, then run layer by layer.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "attend.h"
#include "index.h"
#include "page_memory.h"
#include "pool.h"

namespace hybridgen {

struct Layout {
  int32_t num_layers;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t page_size;
  Dtype dtype;
  int64_t page_stride;  // elements from a page to the next, in K and in V: what a page has, or more

  int64_t head_elements() const { return static_cast<int64_t>(page_size) * head_dim; }
};

class Step {
 public:
  // Of the pages in block_table, those numbered [first_page, first_page + num_pages) lie in k_pages and v_pages; the
  // others, up to total_pages, are attended elsewhere. Throws std::invalid_argument for what does not fit.
  Step(Pool& pool, const Layout& layout, std::byte* k_pages, std::byte* v_pages, int32_t first_page, int32_t num_pages,
       int32_t total_pages, int32_t num_seqs, const int32_t* query_begin, const int32_t* kv_len,
       const int32_t* block_table, int64_t max_pages, int32_t num_heads, float scale);
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;

  // From now on `store` writes the index too.
  void keep_index(const Index& index, const IndexKernels& kernels) {
    index_ = index;
    index_kernels_ = &kernels;
  }

  // Counts what is read of the pages from now on. It outlives the step.
  void keep_memory(PageMemory& memory) { memory_ = &memory; }

  // k, v: [tokens, num_kv_heads, head_dim] with `stride` elements between tokens.
  void store(int32_t layer, const std::byte* k, int64_t k_stride, const std::byte* v, int64_t v_stride);

  struct Queries {  // of one layer, and where their result goes; q and out: [tokens, num_heads, head_dim]
    int32_t layer;
    const std::byte* q;
    int64_t q_stride;  // elements between tokens
    std::byte* out;
    int64_t out_stride;
    bool out_float32;
    float* lse;  // [tokens, num_heads]  natural log; or null
    int32_t sliding_window;
    float soft_cap;
  };
  class Attend;

  void attend(const Queries& queries);
  // Returns at once. The step and everything that `queries` points to must outlive the result.
  std::unique_ptr<Attend> submit(const Queries& queries);

 private:
  friend class HybridGenStep;
  friend class MassStep;

  struct Tile {  // consecutive queries of one sequence
    int32_t seq;
    int32_t query;  // row of the first in q
    int32_t num_queries;
    int32_t block_begin;
    int32_t block_end;
    int64_t partial;  // its first float in the pool's partials, per KV head; -1: finished by one item
    int32_t pending;  // items that it was cut into
  };
  struct Item {
    int32_t tile;
    int32_t block_begin;
    int32_t block_end;
    float cost;
    int64_t bytes;  // of keys and values, read once for all rows of the tile
  };
  struct Plan {  // how a layer's work is shared out; layers differ by their sliding window alone
    int32_t sliding_window;
    std::vector<int32_t> begin;  // [tokens]  a query sees keys [begin, key_end_)
    std::vector<Tile> tiles;
    std::vector<Item> items;  // dearest first
    int64_t partial_floats;
    int64_t scratch_bytes;
    bool alone;
  };
  int32_t key_at(int32_t seq, int32_t position) const;
  void check(const Queries& queries) const;
  const Plan& plan(const Queries& queries);
  // Of the sequences that `skip`, if not empty, does not name.
  std::unique_ptr<Plan> make_plan(int32_t sliding_window, const std::vector<char>& skip) const;
  void store_tokens(int32_t layer, const std::byte* k, int64_t k_stride, const std::byte* v, int64_t v_stride,
                    int32_t begin, int32_t end) const;
  void sum_pages(int32_t layer, int32_t token) const;
  void check_layer(int32_t layer) const;
  // Of keys [begin, end) of one KV head, in pages of `pages`, a row each is read.
  void count(Reading& reading, Role role, const int32_t* pages, int32_t begin, int32_t end) const;
  void heat(const int32_t* pages, int32_t begin, int32_t end) const;

  Pool& pool_;
  const Layout layout_;
  std::byte* const k_pages_;
  std::byte* const v_pages_;
  Index index_;
  const IndexKernels* index_kernels_ = nullptr;
  PageMemory* memory_ = nullptr;
  const int32_t num_heads_;
  const float scale_;
  std::vector<int32_t> query_begin_;  // [num_seqs + 1]
  std::vector<int32_t> kv_len_;       // [num_seqs]
  // Keys are numbered by their place among the sequence's tokens that lie on this tier.
  std::vector<int64_t> pages_begin_;  // [num_seqs + 1]  where a sequence's pages begin in pages_
  std::vector<int32_t> pages_;        // on this tier, counted from its first
  std::vector<int64_t> before_begin_;  // [num_seqs]  where a sequence begins in before_
  std::vector<int32_t> before_;       // for each entry of its block table and one more: pages of this tier before it
  std::vector<int32_t> key_end_;      // [tokens]  keys at the query's own and earlier positions
  std::vector<int64_t> slots_;        // [tokens]  page * page_size + offset; -1: the token is not on this tier
  std::vector<int32_t> filled_;       // tokens that take the last slot of a page on this tier
  std::mutex plans_mutex_;  // between callers of submit
  std::vector<std::unique_ptr<Plan>> plans_;
};

class Step::Attend final : public Job {  // one layer's attention in flight
 public:
  Attend(const Step& step, const Plan& plan, const Queries& queries);
  ~Attend() override;
  void wait() noexcept { step_.pool_.wait(ticket_); }
  bool is_done() const { return step_.pool_.is_done(ticket_); }
  int64_t ended_ns() const { return step_.pool_.ended_ns(ticket_); }

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  int64_t scratch_bytes() const override { return plan_.scratch_bytes; }
  int32_t layer() const override { return queries_.layer; }
  const char* name() const override { return "attend"; }

 private:
  friend class Step;

  const Step& step_;
  const Plan& plan_;
  const Queries queries_;
  Buffer buffer_;
  float* partials_;                // [plan.partial_floats]
  std::atomic<int32_t>* pending_;  // [tiles, num_kv_heads]  items still to finish
  Ticket ticket_;
};

}  // namespace hybridgen
