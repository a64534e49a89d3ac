// Persistent threads pinned one to a CPU, in groups that share a NUMA node. They know nothing of attention: a job
// is phases of items, and an item is a number.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "attend.h"
#include "buffers.h"
#include "stats.h"

namespace hybridgen {

class alignas(64) Worker {  // a thread that works on a job: one of the pool's, or a caller
 public:
  std::byte* scratch() const { return scratch_.data(); }
  int32_t group() const { return group_; }

  // Bytes that the item now run has read, for the statistics of its group.
  void count_bytes(int32_t layer, int64_t bytes) {
    if (layer >= 0 && layer < num_layers_) counts_[layer * num_groups_ + item_group_].bytes.add(bytes);
  }

 private:
  friend class Pool;

  // Written by whoever has news.
  std::atomic<int32_t> signal_{0};  // changes when there may be items, or a job has ended; slept on
  enum State : int32_t { busy, idle, called };  // called: counted on to look for items, since somebody saw it idle
  std::atomic<State> state_{busy};
  std::atomic<uint64_t> waiting_for_{0};  // a caller's ticket; 0: not in wait

  // Its own from here on.
  alignas(64) Buffer scratch_;
  int32_t group_ = 0;
  int32_t index_ = 0;
  int32_t item_group_ = 0;
  int32_t num_groups_ = 1;
  int32_t num_layers_ = 0;
  std::unique_ptr<Counts[]> counts_;  // [num_layers, num_groups]
  bool fresh_ = false;                // has yet to claim an item since it began to look for some
  int64_t clock_ns_ = 0;              // end of the item before, if the next one follows at once; else 0
  int64_t busy_ns_ = 0;               // in all
  // The last item that it ran, so that its wait for the end of that job can be counted when the end is known.
  std::atomic<uint64_t> last_job_{0};
  std::atomic<int64_t> last_end_ns_{0};
  std::atomic<int32_t> last_layer_{-1};
  std::vector<Event> events_;  // a ring
  uint64_t num_events_ = 0;
  std::thread thread_;
};

// Work in phases. The submitter owns it; it lives and stays in place until `wait` has returned.
// Neither function may throw, nor submit to or wait for the pool.
class Job {
 public:
  virtual ~Job() = default;

  // Called by one thread when every item of the phase before is done (for phase 0: inside submit). Fills
  // num_items[group] for each group of the pool; all zero ends the job.
  virtual void begin_phase(int32_t phase, int32_t* num_items) = 0;

  // A group's items are begun in ascending order, by its own threads and then by those that have nothing left.
  virtual void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) = 0;

  virtual int64_t scratch_bytes() const = 0;          // for each thread; reserved by submit
  virtual int32_t layer() const { return -1; }        // for the statistics; -1: not counted
  virtual const char* name() const { return "job"; }  // for the trace; outlives the pool
};

struct Ticket {  // of a job; the default one is of a job that is done
  uint64_t id = 0;
  int32_t layer = -1;
  int32_t spared = -1;  // the worker left asleep, since the submitter runs on its CPU
};

class Pool {
 public:
  static constexpr int32_t kMaxJobs = 32;  // in flight
  static constexpr int32_t kMaxGroups = 64;

  struct Place {
    int cpu;
    int32_t group;  // counted from 0 without gaps
  };

  // One thread takes part per place, the waiting thread being one of them: a thread is kept for each place, and
  // the one on the submitter's own CPU sits the job out. Threads of more places than CPUs share them in turn.
  // Throws std::invalid_argument for groups that do not fit, std::system_error where threads are refused.
  Pool(std::vector<Place> places, const Kernels& kernels);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Ends the threads, after the jobs in flight. What is submitted afterwards runs at once in the submitting
  // thread; so it does in a forked child, where a job from before the fork counts as ended whatever became of it.
  void close();

  // Returns at once, unless kMaxJobs are in flight: then helps until one has ended. Items are begun in the order of
  // submission, but a job's may run before an earlier job has ended: one that needs another's results must
  // wait for it. Alone: runs here and now, without waking anyone; for a few microseconds of work.
  // The submitter's CPU is left to it until it waits; so a pool of one thread does the work in `wait`.
  // Throws std::bad_alloc, the job not being taken.
  Ticket submit(Job& job, bool alone = false) { return enqueue(job, alone, false); }

  // From now on `submit` leaves even a few microseconds of work to the threads: for callers that have work of their own,
  // and look at `is_done` instead of helping. Before any job.
  void leave_caller_alone() { leaves_caller_alone_ = true; }

  // Helps with this job and earlier ones, and returns when it is done.
  void wait(const Ticket& ticket) noexcept;

  bool is_done(const Ticket& ticket) const {
    return ticket.id == 0 || slots_[ticket.id % kMaxJobs].done.load(std::memory_order_acquire) >= ticket.id;
  }

  // When the job's last item was done, as now_ns counts; 0 if that is not known any more, or the job ran alone. After its end.
  int64_t ended_ns(const Ticket& ticket) const {
    const Slot& slot = slots_[ticket.id % kMaxJobs];
    const int64_t end_ns = slot.end_ns.load(std::memory_order_relaxed);
    return ticket.id != 0 && slot.done.load(std::memory_order_acquire) == ticket.id ? end_ns : 0;
  }

  void run(Job& job, bool alone = false) { wait(enqueue(job, alone, true)); }

  // A job of one phase from a function; items are begun last first.
  using Run = void (*)(const void* context, int32_t item, std::byte* scratch);
  void run(int32_t num_items, Run run, const void* context, int64_t scratch_bytes, bool alone);

  // The sum of a buffer's 64-bit words, modulo 2^64 (the last bytes that fill no word left out): all threads
  // reading as fast as they can, to compare other work with.
  uint64_t read(const void* data, int64_t bytes);

  // Since the last reset. Bytes, items and busy time go to the group whose item it was, waiting time to
  // the group of the thread.
  Stats stats();
  void reset_stats();

  // Keeps the last `max_events` events of each thread. Both wait for the jobs in flight.
  void start_trace(int32_t max_events);
  std::vector<Event> stop_trace();

  int32_t num_threads() const { return static_cast<int32_t>(places_.size()); }
  int32_t num_groups() const { return num_groups_; }
  const Kernels& kernels() const { return kernels_; }

  Buffers buffers;  // for jobs whose items share memory

 private:
  static constexpr int32_t kMaxCallers = 4;  // that help at once; further ones wait for their turn

  struct alignas(64) Cell {
    std::atomic<int32_t> unclaimed{0};
  };
  struct Slot {  // plain fields: written while nothing is unclaimed or unfinished, read only by who holds an item
    Job* job = nullptr;
    uint64_t id = 0;
    int32_t phase = 0;
    int32_t layer = -1;
    int32_t spared = -1;
    const char* name = nullptr;
    std::unique_ptr<int32_t[]> num_items;  // [num_groups]
    std::unique_ptr<Cell[]> cells;         // [num_groups]
    alignas(64) std::atomic<int32_t> unfinished{0};
    std::atomic<int64_t> end_ns{0};             // of the job in `done`
    alignas(64) std::atomic<uint64_t> done{0};  // the last job that ended here
  };
  struct Seat {  // what a caller works with
    std::mutex mutex;
    Worker worker;
  };
  using Counted = std::array<int32_t, kMaxGroups>;

  void work(Worker& worker, int cpu);
  Ticket enqueue(Job& job, bool alone, bool joins);
  void run_here(Job& job);
  bool run_next(Worker& worker, uint64_t last);
  void run_claimed(Slot& slot, int32_t group, int32_t item, Worker& worker);
  void run_timed(Job& job, const char* name, uint64_t id, int32_t layer, int32_t phase, int32_t group, int32_t item,
                 Worker& worker);
  int32_t begin_phase(Slot& slot);
  void publish(Slot& slot, int32_t total, const Counted& num_items);
  void end_phase(Slot& slot, Worker& worker);
  void finish(Slot& slot);
  void wake(int32_t count, const int32_t* num_items, int32_t spared);
  void wake_another(int32_t spared);
  bool call(Worker& worker);
  static void signal(Worker& worker);
  void settle(Worker& worker, int64_t begin_ns);
  int64_t unsettled_ns(const Worker& worker, int64_t until_ns) const;
  void record(Worker& worker, const Event& event);
  std::unique_lock<std::mutex> take_seat(Worker*& worker);
  std::array<std::unique_lock<std::mutex>, kMaxCallers> take_all_seats();
  int32_t worker_here() const;
  bool forked() const;
  void reserve(const Job& job);
  void drain();
  Stats total_stats();
  template <class F>
  void for_each_worker(F f);

  const std::vector<Place> places_;  // sorted by group
  const Kernels& kernels_;
  const int32_t num_groups_;
  const int fork_count_;
  std::vector<int32_t> group_begin_;  // [num_groups + 1]  a group's first worker
  std::unique_ptr<Worker[]> workers_;
  std::array<Seat, kMaxCallers> seats_;

  std::mutex submit_mutex_;
  std::atomic<bool> closing_{false};
  std::atomic<bool> closed_{false};
  bool leaves_caller_alone_ = false;
  std::atomic<bool> tracing_{false};
  std::atomic<int64_t> scratch_bytes_{0};  // that every worker has
  std::atomic<int32_t> num_layers_{0};     // that every worker counts
  Stats baseline_;                         // at the last reset

  alignas(64) std::atomic<uint64_t> head_{0};  // the job submitted last
  alignas(64) std::atomic<uint64_t> tail_{1};  // jobs before it are done
  alignas(64) std::atomic<int32_t> num_called_{0};  // workers in that state
  std::array<Slot, kMaxJobs> slots_;
};

}  // namespace hybridgen
