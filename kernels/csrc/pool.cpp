#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace hybridgen {
namespace {

// About 5 us: long enough for the next layer's store and attend to find its workers awake when they follow at once,
// short enough not to take the CPU from the linear layers' threads in between.
constexpr int kSpins = 150;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Pool::Pool(std::vector<int> cpus, const Kernels& kernels)
    : cpus_(std::move(cpus)), kernels_(kernels), pid_(getpid()), workers_(new Worker[cpus_.size()]) {
  if (cpus_.size() < 2) return;  // the submitter does it all
  for (size_t i = 0; i < cpus_.size(); ++i) {
    workers_[i].thread = std::thread([this, i] { work(workers_[i], cpus_[i]); });
  }
}

Pool::~Pool() { close(); }

void Pool::close() {
  std::lock_guard<std::mutex> lock(mutex);
  if (std::exchange(closed_, true)) return;
  closing_.store(true);
  for (size_t i = 0; i < cpus_.size(); ++i) {
    Worker& worker = workers_[i];
    if (!worker.thread.joinable()) continue;
    if (getpid() != pid_) {
      worker.thread.detach();
      continue;
    }
    worker.job.fetch_add(1);
    worker.job.notify_one();
    worker.thread.join();
  }
}

void Pool::work(Worker& worker, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // Refused where the allowed set has shrunk meanwhile; the thread then runs where it may.
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  pthread_setname_np(pthread_self(), "hybridgen-pool");
  for (int32_t seen = 0;;) {
    for (int i = 0; i < kSpins && worker.job.load(std::memory_order_acquire) == seen; ++i) pause();
    worker.job.wait(seen, std::memory_order_acquire);
    seen = worker.job.load(std::memory_order_acquire);
    if (closing_.load()) return;
    help(worker.scratch);
  }
}

void Pool::help(const Buffer& scratch) {
  for (;;) {
    int32_t left = unclaimed_.load(std::memory_order_acquire);
    do {
      if (left <= 0) return;
    } while (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel));
    run_(context_, left - 1, scratch.data());
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

void Pool::run(int32_t num_items, Run run, const void* context, int64_t scratch_bytes, bool alone) {
  if (num_items <= 0) return;
  scratch_.reserve(scratch_bytes);
  if (alone || closed_ || cpus_.size() < 2 || getpid() != pid_) {
    for (int32_t item = num_items; item-- > 0;) run(context, item, scratch_.data());
    return;
  }
  const auto num_threads = static_cast<int32_t>(cpus_.size());
  const int here = sched_getcpu();
  const auto own = std::find(cpus_.begin(), cpus_.end() - 1, here) - cpus_.begin();
  for (int32_t i = 0; i < num_threads; ++i) workers_[i].scratch.reserve(scratch_bytes);
  run_ = run;
  context_ = context;
  unfinished_.store(num_items, std::memory_order_relaxed);
  unclaimed_.store(num_items, std::memory_order_release);
  int32_t to_wake = std::min(num_threads, num_items) - 1;
  for (int32_t i = 0; i < num_threads && to_wake > 0; ++i) {
    if (i == own) continue;
    workers_[i].job.fetch_add(1, std::memory_order_release);
    workers_[i].job.notify_one();
    --to_wake;
  }
  help(scratch_);
  for (int i = 0; unfinished_.load(std::memory_order_acquire) != 0; ++i) {
    if (i < 10 * kSpins) {
      pause();
      continue;
    }
    const int32_t left = unfinished_.load(std::memory_order_acquire);
    if (left != 0) unfinished_.wait(left, std::memory_order_acquire);
  }
}

}  // namespace hybridgen
