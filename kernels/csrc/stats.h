// What a pool's threads note down while they work: counters per layer and group, and events of a trace.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <initializer_list>
#include <vector>

namespace hybridgen {

// The clock of Python's time.perf_counter_ns.
inline int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

class Count {  // written by one thread, read by any
 public:
  void add(int64_t n) { value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
  int64_t load() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

struct Counts {  // one thread's, for one layer and group
  Count bytes;
  Count items;
  Count busy_ns;
  Count waiting_ns;
  Count blocked_ns;

  void add(const Counts& other) {
    bytes.add(other.bytes.load());
    items.add(other.items.load());
    busy_ns.add(other.busy_ns.load());
    waiting_ns.add(other.waiting_ns.load());
    blocked_ns.add(other.blocked_ns.load());
  }
};

struct Stats {  // each [num_layers, num_groups], but blocked_ns [num_layers]
  int32_t num_layers = 0;
  std::vector<int64_t> bytes;
  std::vector<int64_t> items;
  std::vector<int64_t> busy_ns;
  std::vector<int64_t> waiting_ns;
  std::vector<int64_t> blocked_ns;

  void subtract(const Stats& earlier) {
    for (auto values : {&Stats::bytes, &Stats::items, &Stats::busy_ns, &Stats::waiting_ns, &Stats::blocked_ns}) {
      for (size_t i = 0; i < (earlier.*values).size(); ++i) (this->*values)[i] -= (earlier.*values)[i];
    }
  }
};

struct Event {  // an unbroken run of items of one phase of a job, or a call of wait
  int64_t begin_ns;
  int64_t end_ns;
  uint64_t job;      // its ticket; 0: worked on alone
  const char* name;  // the job's
  int32_t thread;    // from num_threads on: callers
  int32_t layer;
  int32_t phase;  // -1: a caller's wait, its own items included
};

}  // namespace hybridgen
