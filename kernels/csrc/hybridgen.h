// Attention as HybridGen publishes it: the logits of all keys of a tier, then values of the top k of each query head.
//
// Per sequence of one query: q.k of every key, in the keys' own precision; per query head the k largest logits, the
// earlier key where two are equal; softmax and values over these alone. The result is (out, lse) over the top k, so
// merging it with another tier's part by lse is one softmax over the concatenated logits. The rest is ignored and
// renormalised away; since its logits are known, what that loses is measured.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "pool.h"
#include "stats.h"
#include "step.h"

namespace hybridgen {

struct TopKStats {  // of one layer, since the last reset
  int64_t count = 0;  // query heads of tokens whose keys were scored
  double sum = 0;     // of their retained masses
  double minimum = 1;
  int64_t scanned = 0;   // tokens, per query head
  int64_t attended = 0;  // of these
};

struct TopKRecord {
  std::vector<TopKStats> layers;
  std::atomic<int64_t> busy_ns{0};  // of all threads, for what was scored
};

class HybridGenStep {  // one forward pass: which sequences are scored and how the work is cut
 public:
  // ratio: of a sequence's tokens on this tier, that each query head attends to. Sequences with fewer tokens than
  // min_tokens are attended in full.
  HybridGenStep(const Step& step, double ratio, int32_t min_tokens, TopKRecord& record);

  enum class Part {
    all,
    scored,  // sequences that are scored; rows of queries, out and lse are those of `rows` and no others
    others,  // the rest; rows of the scored ones are not written
  };
  class Attend;
  // As Step::submit does; the result is in float32. Layers with a sliding window are none of this class's business.
  std::unique_ptr<Attend> submit(const Step::Queries& queries, Part part);

  const std::vector<int32_t>& rows() const { return rows_; }  // ascending; of the sequences that are scored
  // Whether scored sequences have stored all that they see here before the pass begins.
  bool is_settled() const { return settled_; }

 private:
  struct Sequence {  // one that is scored
    int32_t num_tokens;
    int32_t num_blocks;
    int32_t top_k;
    int32_t num_slices;  // blocks of selected tokens
    const int32_t* pages;
    // Where its part of the job's memory begins, in bytes.
    int64_t logits;      // [num_heads, num_blocks, kBlockTokens]
    int64_t block_sums;  // [num_heads, num_blocks, 2]
    int64_t tokens;      // [num_heads, top_k]
    int64_t partials;    // [num_heads, num_slices, partial_floats(1, head_dim)]
    int64_t heads;       // [num_heads]
  };
  struct Head {  // a sequence and a query head
    float total;  // natural log of the sum of exp(logit) over all keys
    double mass;
    std::atomic<int32_t> pending;  // slices
  };
  struct Item {
    int32_t sequence;
    int32_t head;   // a KV head to score, a query head to attend
    int32_t begin;  // blocks
    int32_t end;
  };

  const Step& step_;
  TopKRecord& record_;
  const int32_t group_;
  bool settled_ = true;
  std::vector<int32_t> rows_;
  std::vector<Sequence> sequences_;
  std::vector<Item> score_items_;
  std::vector<Item> attend_items_;
  int64_t job_bytes_ = 0;
  int64_t scratch_bytes_ = 0;
  std::unique_ptr<Step::Plan> others_;  // of the sequences that are attended in full
};

class HybridGenStep::Attend final : public Job {  // one layer's attention in flight
 public:
  Attend(HybridGenStep& step, const Step::Queries& queries, Part part);
  ~Attend() override;
  void wait() noexcept { step_.step_.pool_.wait(ticket_); }
  bool is_done() const { return step_.step_.pool_.is_done(ticket_); }
  int64_t ended_ns() const { return step_.step_.pool_.ended_ns(ticket_); }

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  int64_t scratch_bytes() const override { return step_.scratch_bytes_; }
  int32_t layer() const override { return queries_.layer; }
  const char* name() const override { return "hybridgen"; }

 private:
  friend class HybridGenStep;

  template <class T>
  T* at(int64_t offset, int64_t element) const {
    return reinterpret_cast<T*>(buffer_.data() + offset) + element;
  }
  float* logits(const Sequence& sequence, int32_t head) const {
    return at<float>(sequence.logits, int64_t{head} * sequence.num_blocks * kBlockTokens);
  }
  int32_t row(int32_t sequence) const { return part_ == Part::scored ? sequence : step_.rows_[sequence]; }
  AttendTask task(int32_t sequence, int32_t kv_head) const;
  void score(const Item& item, Worker& worker) const;
  void choose(int32_t sequence, int32_t head) const;
  void count(Reading& reading, const Sequence& sequence, const int32_t* selected, const float* logits, float total,
             int32_t begin, int32_t end) const;
  void attend(const Item& item, Worker& worker) const;

  HybridGenStep& step_;
  const Step::Queries queries_;
  const Part part_;
  std::unique_ptr<Step::Attend> others_;
  Buffer buffer_;
  int32_t num_other_items_ = 0;
  Ticket ticket_;
};

}  // namespace hybridgen
