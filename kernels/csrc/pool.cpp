#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace hybridgen {
namespace {

// About 5 us: long enough for the next layer's store and attend to find its workers awake when they follow at once,
// short enough not to take the CPU from the linear layers' threads in between.
constexpr int kSpins = 150;
// A caller has nothing else to do, and what it waits for is mostly the end of an item.
constexpr int kCallerSpins = 10 * kSpins;

constexpr int64_t kTraceGapNs = 2000;  // items closer than this are one event
constexpr uint64_t kAnyJob = std::numeric_limits<uint64_t>::max();

// Threads do not survive a fork: a pool from before it has none in the child. Counted rather than asked of
// getpid, which is a system call.
std::atomic<int> fork_count{0};

int watch_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); });
  static_cast<void>(registered);
  return fork_count.load();
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

std::vector<Pool::Place> by_group(std::vector<Pool::Place> places) {
  std::stable_sort(places.begin(), places.end(),
                   [](const Pool::Place& a, const Pool::Place& b) { return a.group < b.group; });
  return places;
}

class FunctionJob final : public Job {
 public:
  FunctionJob(int32_t num_items, Pool::Run run, const void* context, int64_t scratch_bytes)
      : num_items_(num_items), run_(run), context_(context), scratch_bytes_(scratch_bytes) {}

  void begin_phase(int32_t phase, int32_t* num_items) override { num_items[0] = phase == 0 ? num_items_ : 0; }
  void run_item(int32_t, int32_t, int32_t item, Worker& worker) override {
    run_(context_, num_items_ - 1 - item, worker.scratch());
  }
  int64_t scratch_bytes() const override { return scratch_bytes_; }

 private:
  const int32_t num_items_;
  const Pool::Run run_;
  const void* const context_;
  const int64_t scratch_bytes_;
};

}  // namespace

Pool::Pool(std::vector<Place> places, const Kernels& kernels)
    : places_(by_group(std::move(places))),
      kernels_(kernels),
      num_groups_(places_.empty() ? 0 : places_.back().group + 1),
      fork_count_(watch_forks()),
      workers_(new Worker[places_.size()]) {
  if (places_.empty()) throw std::invalid_argument("a pool needs at least one thread");
  if (num_groups_ > kMaxGroups) throw std::invalid_argument("a pool has at most 64 groups");
  for (int32_t i = 0; i < num_threads(); ++i) {
    const int32_t group = places_[i].group;
    const auto begun = static_cast<int32_t>(group_begin_.size());
    if (group < 0 || group > begun) throw std::invalid_argument("groups must be counted from 0 without gaps");
    if (group == begun) group_begin_.push_back(i);
    workers_[i].group_ = group;
    workers_[i].index_ = i;
  }
  group_begin_.push_back(num_threads());
  for (int32_t i = 0; i < kMaxCallers; ++i) seats_[i].worker.index_ = num_threads() + i;
  for_each_worker([this](Worker& worker) { worker.num_groups_ = num_groups_; });
  for (Slot& slot : slots_) {
    slot.num_items = std::make_unique<int32_t[]>(num_groups_);
    slot.cells = std::make_unique<Cell[]>(num_groups_);
  }
  if (num_threads() < 2) return;  // the caller does it all
  try {
    for (int32_t i = 0; i < num_threads(); ++i) {
      workers_[i].thread_ = std::thread([this, i] { work(workers_[i], places_[i].cpu); });
    }
  } catch (...) {
    close();
    throw;
  }
}

Pool::~Pool() { close(); }

void Pool::close() {
  if (forked()) {  // a lock may have been held by a thread that is not here
    closed_.store(true);
    for (int32_t i = 0; i < num_threads(); ++i) {
      if (workers_[i].thread_.joinable()) workers_[i].thread_.detach();
    }
    return;
  }
  const std::lock_guard<std::mutex> lock(submit_mutex_);
  if (closed_.exchange(true)) return;
  drain();
  closing_.store(true);
  for (int32_t i = 0; i < num_threads(); ++i) {
    if (!workers_[i].thread_.joinable()) continue;
    signal(workers_[i]);
    workers_[i].thread_.join();
  }
}

void Pool::work(Worker& worker, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // Refused where the allowed set has shrunk meanwhile; the thread then runs where it may.
  pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
  pthread_setname_np(pthread_self(), "hybridgen-pool");
  for (;;) {
    const int32_t seen = worker.signal_.load(std::memory_order_acquire);
    // Before the last look: who publishes items and does not find this thread idle knows that it will see them.
    if (worker.state_.exchange(Worker::idle) == Worker::called) num_called_.fetch_sub(1);
    worker.fresh_ = true;
    bool worked = false;
    while (run_next(worker, kAnyJob)) worked = true;
    worker.clock_ns_ = 0;
    if (worked) continue;
    if (closing_.load()) return;
    for (int i = 0; i < kSpins && worker.signal_.load(std::memory_order_acquire) == seen; ++i) pause();
    worker.signal_.wait(seen, std::memory_order_acquire);
  }
}

// A waiter's value changes by an operation that is a full barrier, since whether anyone waits is looked up after it.
void Pool::signal(Worker& worker) {
  worker.signal_.fetch_add(1);
  worker.signal_.notify_one();
}

bool Pool::call(Worker& worker) {
  Worker::State state = Worker::idle;
  if (worker.state_.load() != state || !worker.state_.compare_exchange_strong(state, Worker::called)) return false;
  num_called_.fetch_add(1);
  signal(worker);
  return true;
}

// Wakes `count` idle threads, if there are as many: those of groups with items before those that would steal.
void Pool::wake(int32_t count, const int32_t* num_items, int32_t spared) {
  for (const bool steal : {false, true}) {
    for (int32_t group = 0; group < num_groups_; ++group) {
      int32_t here = steal ? count : std::min(count, num_items[group]);
      for (int32_t i = group_begin_[group]; i < group_begin_[group + 1] && here > 0; ++i) {
        Worker& worker = workers_[i];
        if (i == spared || !call(worker)) continue;
        --here;
        --count;
      }
      if (count <= 0) return;
    }
  }
}

// Of several publishers each may have called the same thread: one that begins to work sees to it that items left
// over find another, unless one is already on its way, which will do the same.
void Pool::wake_another(int32_t spared) {
  if (num_called_.load() > 0) return;
  const uint64_t head = head_.load();
  for (uint64_t id = tail_.load(std::memory_order_acquire); id <= head; ++id) {
    for (int32_t group = 0; group < num_groups_; ++group) {
      if (slots_[id % kMaxJobs].cells[group].unclaimed.load() <= 0) continue;
      Counted num_items{};
      num_items[group] = 1;
      return wake(1, num_items.data(), spared);
    }
  }
}

// Runs one unclaimed item of the jobs up to `last`, of the oldest that has any. False: there is none.
bool Pool::run_next(Worker& worker, uint64_t last) {
  last = std::min(last, head_.load());
  for (uint64_t id = tail_.load(std::memory_order_acquire); id <= last; ++id) {
    // The slot may already be another job's. No matter: all that is said of a job is read after claiming an item.
    Slot& slot = slots_[id % kMaxJobs];
    for (int32_t i = 0; i < num_groups_; ++i) {
      const int32_t group = (worker.group_ + i) % num_groups_;
      std::atomic<int32_t>& unclaimed = slot.cells[group].unclaimed;
      int32_t left = unclaimed.load();
      while (left > 0) {
        if (!unclaimed.compare_exchange_weak(left, left - 1)) continue;
        run_claimed(slot, group, slot.num_items[group] - left, worker);
        return true;
      }
    }
  }
  return false;
}

void Pool::run_claimed(Slot& slot, int32_t group, int32_t item, Worker& worker) {
  if (worker.fresh_) {
    worker.fresh_ = false;
    if (worker.state_.exchange(Worker::busy) == Worker::called) num_called_.fetch_sub(1);
    wake_another(slot.spared);
  }
  run_timed(*slot.job, slot.name, slot.id, slot.layer, slot.phase, group, item, worker);
  if (slot.unfinished.fetch_sub(1, std::memory_order_acq_rel) == 1) end_phase(slot, worker);
}

// Runs an item and notes it. Takes what it needs of the slot, since a job run alone has none.
void Pool::run_timed(Job& job, const char* name, uint64_t id, int32_t layer, int32_t phase, int32_t group,
                     int32_t item, Worker& worker) {
  const int64_t begin = worker.clock_ns_ != 0 ? worker.clock_ns_ : now_ns();
  settle(worker, begin);
  worker.item_group_ = group;
  job.run_item(phase, group, item, worker);
  const int64_t end = now_ns();
  worker.clock_ns_ = end;
  worker.busy_ns_ += end - begin;
  if (layer >= 0 && layer < worker.num_layers_) {
    Counts& counts = worker.counts_[layer * num_groups_ + group];
    counts.items.add(1);
    counts.busy_ns.add(end - begin);
  }
  if (worker.index_ < num_threads()) {
    worker.last_end_ns_.store(end, std::memory_order_relaxed);
    worker.last_layer_.store(layer, std::memory_order_relaxed);
    worker.last_job_.store(id, std::memory_order_relaxed);
  }
  if (tracing_.load(std::memory_order_relaxed)) {
    record(worker, {begin, end, id, name, worker.index_, layer, phase});
  }
}

// Counts the time from a worker's last item to `begin_ns` or, if that was earlier, to the end of the item's job.
void Pool::settle(Worker& worker, int64_t begin_ns) {
  if (worker.last_job_.load(std::memory_order_relaxed) == 0) return;
  const int32_t layer = worker.last_layer_.load(std::memory_order_relaxed);
  if (layer >= 0 && layer < worker.num_layers_) {
    worker.counts_[layer * num_groups_ + worker.group_].waiting_ns.add(unsettled_ns(worker, begin_ns));
  }
  worker.last_job_.store(0, std::memory_order_relaxed);
}

int64_t Pool::unsettled_ns(const Worker& worker, int64_t until_ns) const {
  const uint64_t id = worker.last_job_.load(std::memory_order_relaxed);
  if (id == 0) return 0;
  const Slot& slot = slots_[id % kMaxJobs];
  const uint64_t done = slot.done.load(std::memory_order_acquire);
  // So long asleep that nobody knows any more when the job ended: it had no need of this thread.
  if (done > id) return 0;
  if (done == id) until_ns = std::min(until_ns, slot.end_ns.load(std::memory_order_relaxed));
  return std::max<int64_t>(0, until_ns - worker.last_end_ns_.load(std::memory_order_relaxed));
}

void Pool::record(Worker& worker, const Event& event) {
  const size_t size = worker.events_.size();
  if (size == 0) return;
  if (worker.num_events_ > 0 && event.phase >= 0) {
    Event& last = worker.events_[(worker.num_events_ - 1) % size];
    if (last.job == event.job && last.phase == event.phase && last.layer == event.layer && last.name == event.name &&
        event.begin_ns - last.end_ns < kTraceGapNs) {
      last.end_ns = event.end_ns;
      return;
    }
  }
  worker.events_[worker.num_events_++ % size] = event;
}

int32_t Pool::begin_phase(Slot& slot) {
  std::fill_n(slot.num_items.get(), num_groups_, 0);
  slot.job->begin_phase(slot.phase, slot.num_items.get());
  return std::accumulate(slot.num_items.get(), slot.num_items.get() + num_groups_, int32_t{0});
}

// Hands the items out. As soon as the last of them is, the phase may have ended and another thread be publishing the
// next: the slot's plain fields are no longer the publisher's, nor are the cells of groups without items.
void Pool::publish(Slot& slot, int32_t total, const Counted& num_items) {
  slot.unfinished.store(total, std::memory_order_relaxed);
  for (int32_t group = 0; group < num_groups_; ++group) {
    if (num_items[group] > 0) slot.cells[group].unclaimed.store(num_items[group]);
  }
}

void Pool::end_phase(Slot& slot, Worker& worker) {
  ++slot.phase;
  const int32_t total = begin_phase(slot);
  if (total == 0) return finish(slot);
  Counted num_items;
  std::copy_n(slot.num_items.get(), num_groups_, num_items.begin());
  const uint64_t id = slot.id;
  const int32_t spared = slot.spared;
  publish(slot, total, num_items);
  // One less than there are items, where this thread goes on to take one; a caller whose own job ends may not.
  worker.fresh_ = true;
  const bool joins = worker.index_ < num_threads() || worker.waiting_for_.load() >= id;
  int32_t count = joins ? std::min(total, num_threads()) - 1 : std::min(total, num_threads() - 1);
  for (Seat& seat : seats_) {
    if (count == 0) return;
    if (&seat.worker == &worker || seat.worker.waiting_for_.load() < id) continue;
    signal(seat.worker);
    --count;
  }
  wake(count, num_items.data(), spared);
}

void Pool::finish(Slot& slot) {
  const uint64_t id = slot.id;
  slot.end_ns.store(now_ns(), std::memory_order_relaxed);
  slot.done.store(id);
  // From here on the job may be gone and the slot another job's.
  uint64_t tail = tail_.load();
  while (tail <= head_.load() && slots_[tail % kMaxJobs].done.load(std::memory_order_acquire) >= tail) {
    if (tail_.compare_exchange_weak(tail, tail + 1)) ++tail;
  }
  for (Seat& seat : seats_) {
    if (seat.worker.waiting_for_.load() == id) signal(seat.worker);
  }
}

Ticket Pool::enqueue(Job& job, bool alone, bool joins) {
  if ((alone && (joins || !leaves_caller_alone_)) || forked() || closed_.load()) {
    run_here(job);
    return {};
  }
  std::unique_lock<std::mutex> lock(submit_mutex_);
  if (closed_.load()) {
    lock.unlock();
    run_here(job);
    return {};
  }
  reserve(job);
  const uint64_t id = head_.load(std::memory_order_relaxed) + 1;
  Slot& slot = slots_[id % kMaxJobs];
  if (id > kMaxJobs) wait({id - kMaxJobs});
  slot.job = &job;
  slot.id = id;
  slot.phase = 0;
  slot.layer = job.layer();
  slot.name = job.name();
  slot.spared = worker_here();
  const int32_t total = begin_phase(slot);
  if (total == 0) return {};
  const Ticket ticket{id, slot.layer, slot.spared};
  Counted num_items;
  std::copy_n(slot.num_items.get(), num_groups_, num_items.begin());
  publish(slot, total, num_items);
  head_.store(id);
  wake(joins ? std::min(total, num_threads()) - 1 : std::min(total, num_threads() - 1), num_items.data(),
       ticket.spared);
  return ticket;
}

void Pool::wait(const Ticket& ticket) noexcept {
  if (is_done(ticket) || forked()) return;
  const int64_t begin = now_ns();
  Worker* worker = nullptr;
  const std::unique_lock<std::mutex> seat = take_seat(worker);
  const int32_t here = worker_here();
  worker->group_ = workers_[here].group_;
  const int64_t busy_before = worker->busy_ns_;
  worker->waiting_for_.store(ticket.id);
  // The caller has moved to another CPU since: the one that it left is free now.
  if (ticket.spared >= 0 && ticket.spared != here) call(workers_[ticket.spared]);
  worker->fresh_ = true;
  for (int spins = 0;;) {
    const int32_t seen = worker->signal_.load(std::memory_order_acquire);
    if (is_done(ticket)) break;
    if (run_next(*worker, ticket.id)) continue;
    worker->clock_ns_ = 0;
    while (spins < kCallerSpins && worker->signal_.load(std::memory_order_acquire) == seen && !is_done(ticket)) {
      pause();
      ++spins;
    }
    if (spins == kCallerSpins && !is_done(ticket)) worker->signal_.wait(seen, std::memory_order_acquire);
  }
  worker->waiting_for_.store(0);
  worker->clock_ns_ = 0;
  const int64_t end = now_ns();
  if (ticket.layer >= 0 && ticket.layer < worker->num_layers_) {
    const int64_t busy = worker->busy_ns_ - busy_before;
    worker->counts_[ticket.layer * num_groups_].blocked_ns.add(end - begin - busy);
  }
  if (tracing_.load(std::memory_order_relaxed)) {
    record(*worker, {begin, end, ticket.id, "wait", worker->index_, ticket.layer, -1});
  }
}

void Pool::run_here(Job& job) {
  const auto run_all = [&](Worker& worker) {
    const int32_t layer = job.layer();
    Counted num_items;
    for (int32_t phase = 0;; ++phase) {
      num_items.fill(0);
      job.begin_phase(phase, num_items.data());
      if (std::all_of(num_items.begin(), num_items.end(), [](int32_t n) { return n == 0; })) return;
      for (int32_t group = 0; group < num_groups_; ++group) {
        for (int32_t item = 0; item < num_items[group]; ++item) {
          run_timed(job, job.name(), 0, layer, phase, group, item, worker);
        }
      }
    }
  };
  if (forked()) {  // touches nothing that a thread left behind may have held
    Worker worker;
    worker.index_ = num_threads();
    worker.scratch_.reserve(job.scratch_bytes());
    return run_all(worker);
  }
  if (job.scratch_bytes() > scratch_bytes_.load() || job.layer() >= num_layers_.load()) {
    const std::lock_guard<std::mutex> lock(submit_mutex_);
    reserve(job);
  }
  Worker* worker = nullptr;
  const std::unique_lock<std::mutex> seat = take_seat(worker);
  worker->group_ = workers_[worker_here()].group_;
  run_all(*worker);
  worker->clock_ns_ = 0;
}

void Pool::run(int32_t num_items, Run run, const void* context, int64_t scratch_bytes, bool alone) {
  if (num_items <= 0) return;
  FunctionJob job(num_items, run, context, scratch_bytes);
  this->run(job, alone);
}

std::unique_lock<std::mutex> Pool::take_seat(Worker*& worker) {
  for (Seat& seat : seats_) {
    std::unique_lock<std::mutex> lock(seat.mutex, std::try_to_lock);
    if (!lock.owns_lock()) continue;
    worker = &seat.worker;
    return lock;
  }
  worker = &seats_[0].worker;
  return std::unique_lock<std::mutex>(seats_[0].mutex);
}

std::array<std::unique_lock<std::mutex>, Pool::kMaxCallers> Pool::take_all_seats() {
  std::array<std::unique_lock<std::mutex>, kMaxCallers> locks;
  for (int32_t i = 0; i < kMaxCallers; ++i) locks[i] = std::unique_lock<std::mutex>(seats_[i].mutex);
  return locks;
}

// The worker whose CPU the caller is on; the last one where it is on none of the pool's.
int32_t Pool::worker_here() const {
  const int cpu = sched_getcpu();
  int32_t i = 0;
  while (i < num_threads() - 1 && places_[i].cpu != cpu) ++i;
  return i;
}

bool Pool::forked() const { return fork_count.load(std::memory_order_relaxed) != fork_count_; }

template <class F>
void Pool::for_each_worker(F f) {
  for (int32_t i = 0; i < num_threads(); ++i) f(workers_[i]);
  for (Seat& seat : seats_) f(seat.worker);
}

// Waits for the jobs in flight; the caller holds `submit_mutex_`, so that there come no new ones.
void Pool::drain() {
  const uint64_t head = head_.load();
  for (uint64_t id = tail_.load(); id <= head; ++id) wait({id});
}

// What a job needs and no job before it did. While it grows nobody may work; `submit_mutex_` is held.
void Pool::reserve(const Job& job) {
  const int64_t scratch_bytes = std::max(job.scratch_bytes(), scratch_bytes_.load());
  const int32_t old_layers = num_layers_.load();
  const int32_t num_layers = std::max(job.layer() + 1, old_layers);
  if (scratch_bytes == scratch_bytes_.load() && num_layers == old_layers) return;
  drain();
  const auto seats = take_all_seats();
  for_each_worker([&](Worker& worker) { worker.scratch_.reserve(scratch_bytes); });
  scratch_bytes_.store(scratch_bytes);
  if (num_layers == old_layers) return;
  const int32_t room = std::max(num_layers, 2 * old_layers);  // layers come one after another
  for_each_worker([&](Worker& worker) {
    auto counts = std::make_unique<Counts[]>(static_cast<size_t>(room) * num_groups_);
    for (int32_t i = 0; i < old_layers * num_groups_; ++i) counts[i].add(worker.counts_[i]);
    worker.counts_ = std::move(counts);
    worker.num_layers_ = room;
  });
  num_layers_.store(room);
}

Stats Pool::total_stats() {
  Stats total;
  total.num_layers = num_layers_.load();
  const auto size = static_cast<size_t>(total.num_layers) * num_groups_;
  for (auto* values : {&total.bytes, &total.items, &total.busy_ns, &total.waiting_ns}) values->resize(size);
  total.blocked_ns.resize(total.num_layers);
  for_each_worker([&](const Worker& worker) {
    for (size_t i = 0; i < size; ++i) {
      const Counts& counts = worker.counts_[i];
      total.bytes[i] += counts.bytes.load();
      total.items[i] += counts.items.load();
      total.busy_ns[i] += counts.busy_ns.load();
      total.waiting_ns[i] += counts.waiting_ns.load();
      total.blocked_ns[i / num_groups_] += counts.blocked_ns.load();
    }
    const int32_t layer = worker.last_layer_.load(std::memory_order_relaxed);
    const uint64_t id = worker.last_job_.load(std::memory_order_relaxed);
    if (layer >= 0 && layer < total.num_layers && is_done({id})) {
      total.waiting_ns[layer * num_groups_ + worker.group_] += unsettled_ns(worker, now_ns());
    }
  });
  return total;
}

Stats Pool::stats() {
  std::unique_lock<std::mutex> lock(submit_mutex_, std::defer_lock);
  if (!forked()) lock.lock();
  Stats stats = total_stats();
  stats.subtract(baseline_);
  return stats;
}

void Pool::reset_stats() {
  std::unique_lock<std::mutex> lock(submit_mutex_, std::defer_lock);
  if (!forked()) lock.lock();
  baseline_ = total_stats();
}

void Pool::start_trace(int32_t max_events) {
  if (max_events < 1) throw std::invalid_argument("a trace of no events");
  if (forked()) return;
  const std::lock_guard<std::mutex> lock(submit_mutex_);
  drain();
  const auto seats = take_all_seats();
  for_each_worker([&](Worker& worker) {
    worker.events_.resize(max_events);
    worker.num_events_ = 0;
  });
  tracing_.store(true);
}

std::vector<Event> Pool::stop_trace() {
  std::vector<Event> events;
  if (forked()) return events;
  const std::lock_guard<std::mutex> lock(submit_mutex_);
  drain();
  const auto seats = take_all_seats();
  tracing_.store(false);
  for_each_worker([&](Worker& worker) {
    const uint64_t size = worker.events_.size();
    const uint64_t end = worker.num_events_;
    for (uint64_t i = end > size ? end - size : 0; i < end; ++i) events.push_back(worker.events_[i % size]);
    worker.events_ = {};
    worker.num_events_ = 0;
  });
  std::stable_sort(events.begin(), events.end(),
                   [](const Event& a, const Event& b) { return a.begin_ns < b.begin_ns; });
  return events;
}

}  // namespace hybridgen
