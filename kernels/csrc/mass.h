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

  void add(const MassStats& other);
};

struct MassRecord {
  std::vector<MassStats> layers;
};

class MassStep {  // one forward pass: which sequences are scanned and how the work is cut
 public:
  MassStep(const Step& step, const Index& index, const std::string& isa, const MassOptions& options,
           MassRecord& record);

  class Attend;
  // As Step::submit does; the result is in float32. Layers with a sliding window are none of this class's business.
  std::unique_ptr<Attend> submit(const Step::Queries& queries);

  int32_t num_scanned() const { return static_cast<int32_t>(sequences_.size()); }  // sequences

 private:
  struct Sequence {  // one that is scanned
    int32_t query;   // its row
    int32_t num_tokens;
    int32_t num_blocks;
    int32_t num_sinks;
    int32_t always_begin;
    const int32_t* pages;
  };
  struct Item {
    int32_t pair;
    int32_t begin;  // blocks of a scan, or a slice
    int32_t end;    // 0: the whole pair, from scan to result
  };
  struct Memory;
  struct Pair;

  int64_t memory_bytes(int32_t num_blocks) const;

  const Step& step_;
  const Index index_;
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
};

class MassStep::Attend final : public Job {  // one layer's attention in flight
 public:
  Attend(MassStep& step, const Step::Queries& queries);
  ~Attend() override;
  void wait() noexcept { step_.step_.pool_.wait(ticket_); }
  bool is_done() const { return step_.step_.pool_.is_done(ticket_); }

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  int64_t scratch_bytes() const override { return step_.scratch_bytes_; }
  int32_t layer() const override { return queries_.layer; }
  const char* name() const override { return "mass"; }

 private:
  friend class MassStep;

  void run_pair(int32_t pair, Worker& worker);
  void bind(Pair& pair, int32_t number, std::byte* memory) const;
  ScanTask scan_task(const Pair& pair, std::byte*& scratch) const;
  void scan(Pair& pair, int32_t begin, int32_t end, Worker& worker) const;
  void weigh(Pair& pair, std::byte* scratch) const;
  void score(Pair& pair, int32_t begin, int32_t end, std::byte* scratch) const;
  void choose(Pair& pair) const;
  void attend(Pair& pair, int32_t slice, Worker& worker) const;
  bool finish(Pair& pair) const;
  void write(Pair& pair) const;

  MassStep& step_;
  const Step::Queries queries_;
  std::unique_ptr<Step::Attend> others_;
  Buffer buffer_;
  Pair* pairs_;             // [pairs]
  std::vector<Item> items_;  // of the phase, from the second attending one on
  int32_t num_other_items_ = 0;
  Ticket ticket_;
};

}  // namespace hybridgen
