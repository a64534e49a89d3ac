// Where a tier's pages lie, what is read of them, and memory nodes that are slower than they are. Labels come from
// outside and do not change while work is in flight; reading is counted here.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace hybridgen {

enum class Role : int32_t { index, v_sums, k, v };  // what of a page is read; the order of `labels`
constexpr int32_t kNumRoles = 4;

struct NodeSpeed {        // of a node that is emulated; zeros: as fast as it is
  double bytes_per_ns = 0;
  double latency_ns = 0;  // added to every item that reads of the node
};

class PageMemory {
 public:
  static constexpr int32_t kMaxNodes = 32;

  // labels: [kNumRoles, num_pages]  the number of the node that a page's role lies on, below speeds.size()
  // heat: [2, num_pages] or null  added to by what reads pages: softmax mass, averaged over the query heads of a KV head
  // and counted once for each layer and KV head; tokens whose K or V was read, likewise.
  // Both outlive this. Throws std::invalid_argument for more nodes than kMaxNodes, or none.
  PageMemory(int32_t num_pages, const uint8_t* labels, float* heat, std::vector<NodeSpeed> speeds);

  int32_t num_nodes() const { return static_cast<int32_t>(speeds_.size()); }
  int32_t node(Role role, int32_t page) const {
    return labels_[static_cast<int64_t>(role) * num_pages_ + page];
  }
  bool has_heat() const { return heat_ != nullptr; }
  void heat(int32_t page, float mass, float tokens) {
    std::atomic_ref<float>(heat_[page]).fetch_add(mass, std::memory_order_relaxed);
    std::atomic_ref<float>(heat_[num_pages_ + page]).fetch_add(tokens, std::memory_order_relaxed);
  }

  struct Counts {
    std::vector<int64_t> bytes;       // [nodes]  read
    std::vector<int64_t> delayed_ns;  // [nodes]  that items were held up by emulation, summed over threads
  };
  Counts take();  // since the last time

  // From now on; not while work is in flight. Throws std::invalid_argument for a node that is not there or a negative speed.
  void set_speed(int32_t node, const NodeSpeed& speed);

 private:
  friend class Reading;

  struct alignas(64) Node {
    std::atomic<int64_t> bytes{0};
    std::atomic<int64_t> delayed_ns{0};
    std::atomic<int64_t> free_ns{0};  // when all that was read of it so far has come, at its emulated rate
  };

  const int32_t num_pages_;
  const uint8_t* const labels_;
  float* const heat_;
  std::vector<NodeSpeed> speeds_;
  const std::unique_ptr<Node[]> nodes_;
  bool emulates_ = false;
};

// What one item reads, from its begin to its end. At the end it waits, busy as a thread is that waits for memory, until
// the emulated nodes would have delivered: a token bucket for each node, shared by all threads.
class Reading {
 public:
  explicit Reading(PageMemory* memory);  // null: counts nothing
  ~Reading();
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  bool counts() const { return memory_ != nullptr; }
  void add(Role role, int32_t page, int64_t bytes) {
    if (memory_ != nullptr) bytes_[memory_->node(role, page)] += bytes;
  }

 private:
  PageMemory* const memory_;
  int64_t begin_ns_ = 0;
  int64_t bytes_[PageMemory::kMaxNodes];
};

}  // namespace hybridgen
