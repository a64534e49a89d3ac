#include "page_memory.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "stats.h"

namespace hybridgen {

PageMemory::PageMemory(int32_t num_pages, const uint8_t* labels, float* heat, std::vector<NodeSpeed> speeds)
    : num_pages_(num_pages),
      labels_(labels),
      heat_(heat),
      speeds_(std::move(speeds)),
      nodes_(std::make_unique<Node[]>(speeds_.size())) {
  if (speeds_.empty() || speeds_.size() > kMaxNodes) {
    throw std::invalid_argument(std::to_string(speeds_.size()) + " memory nodes; there must be 1 to " +
                                std::to_string(kMaxNodes));
  }
  for (int32_t i = 0; i < num_nodes(); ++i) set_speed(i, NodeSpeed(speeds_[i]));
}

void PageMemory::set_speed(int32_t node, const NodeSpeed& speed) {
  if (node < 0 || node >= num_nodes()) {
    throw std::invalid_argument("memory node " + std::to_string(node) + " is not in [0, " +
                                std::to_string(num_nodes()) + ")");
  }
  if (!(speed.bytes_per_ns >= 0) || !(speed.latency_ns >= 0)) {
    throw std::invalid_argument("a memory node's bandwidth and latency must not be negative");
  }
  speeds_[node] = speed;
  emulates_ = std::any_of(speeds_.begin(), speeds_.end(), [](const NodeSpeed& each) {
    return each.bytes_per_ns > 0 || each.latency_ns > 0;
  });
}

PageMemory::Counts PageMemory::take() {
  Counts counts;
  for (int32_t i = 0; i < num_nodes(); ++i) {
    counts.bytes.push_back(nodes_[i].bytes.exchange(0, std::memory_order_relaxed));
    counts.delayed_ns.push_back(nodes_[i].delayed_ns.exchange(0, std::memory_order_relaxed));
  }
  return counts;
}

Reading::Reading(PageMemory* memory) : memory_(memory) {
  if (memory == nullptr) return;
  std::fill_n(bytes_, memory->num_nodes(), int64_t{0});
  if (memory->emulates_) begin_ns_ = now_ns();
}

Reading::~Reading() {
  if (memory_ == nullptr) return;
  for (int32_t i = 0; i < memory_->num_nodes(); ++i) {
    if (bytes_[i] == 0) continue;
    PageMemory::Node& node = memory_->nodes_[i];
    const NodeSpeed& speed = memory_->speeds_[i];
    node.bytes.fetch_add(bytes_[i], std::memory_order_relaxed);
    if (speed.bytes_per_ns <= 0 && speed.latency_ns <= 0) continue;
    int64_t end_ns = begin_ns_;
    if (speed.bytes_per_ns > 0) {
      const auto takes_ns = static_cast<int64_t>(static_cast<double>(bytes_[i]) / speed.bytes_per_ns);
      int64_t free_ns = node.free_ns.load(std::memory_order_relaxed);
      do {
        end_ns = std::max(free_ns, begin_ns_) + takes_ns;
      } while (!node.free_ns.compare_exchange_weak(free_ns, end_ns, std::memory_order_relaxed));
    }
    end_ns += static_cast<int64_t>(speed.latency_ns);
    const int64_t now = now_ns();
    if (end_ns <= now) continue;
    while (now_ns() < end_ns) {
#ifdef HYBRIDGEN_X86_64
      __builtin_ia32_pause();
#endif
    }
    node.delayed_ns.fetch_add(end_ns - now, std::memory_order_relaxed);
  }
}

}  // namespace hybridgen
