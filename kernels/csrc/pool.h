// Persistent threads pinned one to a CPU. They know nothing of attention: an item is a number.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "attend.h"

namespace hybridgen {

class Buffer {  // grows and stays; not zeroed, so that who works on it touches it first
 public:
  std::byte* data() const { return bytes_.get(); }
  void reserve(int64_t size) {
    if (size <= size_) return;
    bytes_.reset(new std::byte[static_cast<size_t>(size)]);
    size_ = size;
  }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  int64_t size_ = 0;
};

class Pool {
 public:
  using Run = void (*)(const void* context, int32_t item, std::byte* scratch);

  // `cpus`: one thread takes part per entry, the submitting thread being one of them. A thread is kept for each
  // CPU; the one on the submitter's own CPU sits a job out.
  Pool(std::vector<int> cpus, const Kernels& kernels);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Ends the threads. Afterwards jobs run in the submitting thread alone.
  void close();

  // Runs items [0, num_items), last first, and returns when all are done; scratch is `scratch_bytes` for each
  // thread. Alone: without waking anyone. One job at a time; callers hold `mutex`.
  void run(int32_t num_items, Run run, const void* context, int64_t scratch_bytes, bool alone);

  int num_threads() const { return static_cast<int>(cpus_.size()); }
  const Kernels& kernels() const { return kernels_; }

  std::mutex mutex;
  Buffer partials;  // shared by the items of a job

 private:
  struct alignas(64) Worker {
    std::atomic<int32_t> job{0};  // changes when there is work; slept on
    std::thread thread;
    Buffer scratch;
  };

  void work(Worker& worker, int cpu);
  void help(const Buffer& scratch);

  const std::vector<int> cpus_;
  const Kernels& kernels_;
  const int pid_;  // threads do not survive a fork
  std::unique_ptr<Worker[]> workers_;
  Buffer scratch_;  // the submitter's
  std::atomic<bool> closing_{false};
  bool closed_ = false;

  // The job. Written while `unclaimed_` is 0, read only by who has claimed an item.
  Run run_ = nullptr;
  const void* context_ = nullptr;
  alignas(64) std::atomic<int32_t> unclaimed_{0};
  alignas(64) std::atomic<int32_t> unfinished_{0};
};

}  // namespace hybridgen
