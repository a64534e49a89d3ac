// Attention that reads K and V of few tokens: those that hold a share of the softmax mass, by the int8 index.
//
// Per sequence and KV head: scan the index of all tokens; give every token a score, its softmax probability averaged
// over the query heads; attend exactly to the fewest tokens whose scores add up to `mass`. What that left out is known
// per query head, so each head's retained mass is measured: exact logits for the tokens attended, estimates for the
// rest. Where it is below the floor, tokens are added until it is not, up to all. With the tail term the rest counts
// as its estimated mass times the mean of V over a sample of pages.
//
// Error. Let eps be the true mass of the tokens left out, e their mass as estimated (0 without the tail term). Every
// part of the result is a mean of values, so it is off by at most max(eps, e) * (diameter of the values), and without
// the tail term by eps * diameter. eps itself is measured to a factor of exp(margin), margin being three standard
// deviations of the estimates' rounding error; the floor holds with that factor counted against it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "index.h"
#include "pool.h"
#include "step.h"

namespace hybridgen {

struct MassOptions {
  double mass;         // that the selected tokens are to hold on average over the query heads
  double floor;        // that they must hold for every query head
  bool tail;           // add the rest's estimated mass times a mean of V
  int32_t num_sinks;   // first tokens of a sequence that are always attended
  int32_t min_tokens;  // shorter sequences are attended in full
};

struct MassStats {  // of one layer, since the last reset
  int64_t count = 0;     // query heads of tokens whose sequence was scanned
  double sum = 0;        // of their retained masses
  double minimum = 1;
  int64_t scanned = 0;   // tokens, per KV head
  int64_t attended = 0;  // of these
  int64_t widened = 0;   // KV heads that fell below the floor at first
  int64_t full = 0;      // KV heads that were attended in full: flat, not to be estimated, or still below the floor
  int64_t foretold = 0;  // KV heads that were selected for a layer ahead
  int64_t rescanned = 0; // of these, that did not hold the floor

  void add(const MassStats& other);
};

struct MassRecord {
  std::vector<MassStats> layers;
};

class MassStep {  // one forward pass: which sequences are scanned and how the work is cut
 public:
  MassStep(const Step& step, const std::string& isa, const MassOptions& options,
           MassRecord& record);

  class Foretelling;
  class Attend;

  // As Step::submit does; the result is in float32. Layers with a sliding window are none of this class's business.
  // With a foretelling of this layer (or null), its selection is attended to, once it is there.
  std::unique_ptr<Attend> submit(const Step::Queries& queries, std::shared_ptr<Foretelling> foretelling);

  // Queries of the scanned sequences, [num_scanned, num_heads, head_dim].
  std::shared_ptr<Foretelling> foretell(int32_t layer, const std::byte* q, int64_t q_stride, float soft_cap);

  int32_t num_scanned() const { return static_cast<int32_t>(sequences_.size()); }  // sequences
  std::vector<int32_t> scanned_rows() const;                                       // [num_scanned]  of the queries

 private:
  struct Sequence {  // one that is scanned
    int32_t query;   // its row
    int32_t num_tokens;
    int32_t num_blocks;
    int32_t num_sinks;
    int32_t always_begin;
    int32_t newest;  // the query's own token, when it is attended but not scanned; or -1
    const int32_t* pages;
  };
  struct Item {
    int32_t pair;
    int32_t begin;  // blocks, or a slice
    int32_t end;    // 0: the whole pair, from scan to result
  };
  struct Pair;
  class Work;

  Sequence make_sequence(int32_t seq, int32_t num_tokens, int32_t newest) const;
  void cut(const std::vector<Sequence>& sequences, const std::vector<int32_t>& pairs, std::vector<Item>& items) const;
  int64_t memory_bytes(int32_t num_blocks) const;

  const Step& step_;
  const IndexKernels& kernels_;
  const MassOptions options_;
  MassRecord& record_;
  const int32_t group_;
  const int32_t chunks_;
  std::vector<Sequence> sequences_;
  std::vector<Item> items_;          // of the first phase; dearest first
  std::vector<Item> cut_items_;      // those of them that are not whole pairs
  std::vector<int64_t> memory_;      // [pairs]  where a cut pair's memory begins in the job's; -1: in scratch
  int64_t job_bytes_ = 0;
  int64_t scratch_bytes_ = 0;
  std::unique_ptr<Step::Plan> others_;  // of the sequences that are attended in full

  // For foretelling: without the newest token, whose key is not stored yet.
  std::vector<Sequence> foretold_;
  std::vector<Item> foretold_items_;
  std::vector<int64_t> foretold_memory_;  // [pairs]
  int64_t foretold_bytes_ = 0;
};

class MassStep::Work : public Job {  // on pairs of sequences and KV heads
 public:
  ~Work() override;
  void wait() noexcept { step_.step_.pool_.wait(ticket_); }
  bool is_done() const { return step_.step_.pool_.is_done(ticket_); }
  int64_t ended_ns() const { return step_.step_.pool_.ended_ns(ticket_); }
  int64_t scratch_bytes() const override { return step_.scratch_bytes_; }
  int32_t layer() const override { return queries_.layer; }

 protected:
  friend class MassStep;

  // `rows`: where a sequence's query lies in `queries`: its row in the step, or its place among those scanned.
  enum class Rows { step, scanned };
  Work(const MassStep& step, const Step::Queries& queries, Rows rows);

  void bind(Pair& pair, const Sequence& sequence, int32_t head, std::byte* memory) const;
  const std::byte* query(const Pair& pair) const;
  ScanTask scan_task(const Pair& pair, std::byte*& scratch) const;
  void scan(Pair& pair, int32_t begin, int32_t end, Worker& worker) const;
  void count_index(Reading& reading, const Pair& pair, int32_t begin, int32_t end, int32_t stride) const;
  void count_tokens(Reading& reading, const Pair& pair, const int32_t* tokens, int32_t first, int32_t num) const;
  float score_of(const Pair& pair, int32_t token) const;
  void weigh(Pair& pair, std::byte* scratch) const;
  void score(Pair& pair, int32_t begin, int32_t end, std::byte* scratch) const;
  void choose(Pair& pair) const;
  void deal(int32_t total, int32_t* num_items) const;

  const MassStep& step_;
  const Step::Queries queries_;
  const Rows rows_;
  Buffer buffer_;
  Pair* pairs_ = nullptr;  // [pairs]
  Ticket ticket_;
};

class MassStep::Foretelling final : public Work {  // what a layer will attend to
 public:
  Foretelling(const MassStep& step, const Step::Queries& queries);
  ~Foretelling() override { wait(); }

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  const char* name() const override { return "foretell"; }

 private:
  friend class MassStep::Attend;
};

class MassStep::Attend final : public Work {  // one layer's attention in flight
 public:
  Attend(const MassStep& step, const Step::Queries& queries, std::shared_ptr<Foretelling> foretelling);
  ~Attend() override { wait(); }

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  const char* name() const override { return "mass"; }

 private:
  void run_pair(int32_t pair, Worker& worker);
  void attend(Pair& pair, int32_t slice, Worker& worker) const;
  void verify(Pair& pair, int32_t begin, int32_t end, Worker& worker) const;
  void fold(Pair& pair) const;
  bool finish(Pair& pair) const;
  void finish_foretold(Pair& pair, std::byte* scratch) const;
  void close(Pair& pair, bool complete) const;

  std::unique_ptr<Step::Attend> others_;
  std::shared_ptr<Foretelling> foretelling_;
  std::vector<Item> items_;  // of the phase, where they are not the step's
  int32_t num_other_items_ = 0;
};

}  // namespace hybridgen
