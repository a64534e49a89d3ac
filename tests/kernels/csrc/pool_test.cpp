// The pool on its own, without Python: every test counts what ran, and jobs are small so that races are many.
// Arguments: names of tests (none: all), or a number of seconds for which all are run again and again. Built with
// sanitizers by `make sanitize`.

#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../kernels/csrc/pool.h"

namespace hybridgen {
namespace {

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

const Kernels kNoKernels{};

using Places = std::vector<Pool::Place>;
using Phases = std::vector<std::vector<int32_t>>;  // [phases][groups]: numbers of items

// `num_threads` threads over `num_groups` groups, on whatever CPUs there are.
Places places(int num_threads, int num_groups = 1) {
  cpu_set_t set;
  sched_getaffinity(0, sizeof(set), &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  Places places;
  for (int i = 0; i < num_threads; ++i) places.push_back({cpus[i % cpus.size()], i % num_groups});
  return places;
}

// On the heap: a std::mutex that leaves the stack tells nobody, and ThreadSanitizer would take the next one there for
// the same.
std::unique_ptr<Pool> make_pool(Places places) { return std::make_unique<Pool>(std::move(places), kNoKernels); }

// Counts the runs of each item, and sees that phases do not overlap and that scratch is one thread's own.
class CountingJob : public Job {
 public:
  explicit CountingJob(Phases phases, int64_t scratch_bytes = 0, int work = 0, int32_t layer = -1)
      : phases_(std::move(phases)), scratch_bytes_(scratch_bytes), work_(work), layer_(layer) {
    for (const auto& groups : phases_) {
      for (const int32_t n : groups) runs_.emplace_back(static_cast<size_t>(n));
    }
  }

  void begin_phase(int32_t phase, int32_t* num_items) override {
    CHECK(phase == next_phase_++);
    CHECK(open_ == 0);
    if (phase == static_cast<int32_t>(phases_.size())) return;
    for (size_t group = 0; group < phases_[phase].size(); ++group) {
      num_items[group] = phases_[phase][group];
      open_ += num_items[group];
    }
  }

  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override {
    CHECK(phase == next_phase_ - 1);
    if (scratch_bytes_ > 0) {
      const auto mark = static_cast<std::byte>(item + 7 * phase);
      std::memset(worker.scratch(), static_cast<int>(mark), static_cast<size_t>(scratch_bytes_));
      CHECK(reinterpret_cast<uintptr_t>(worker.scratch()) % 64 == 0);
      spin();
      CHECK(std::all_of(worker.scratch(), worker.scratch() + scratch_bytes_, [&](std::byte b) { return b == mark; }));
    } else {
      spin();
    }
    worker.count_bytes(layer_, 100 + item);
    // Not atomic: that an item has been run must be visible to who comes after.
    ++runs_[static_cast<size_t>(phase) * phases_[0].size() + group][item];
    --open_;
  }

  int64_t scratch_bytes() const override { return scratch_bytes_; }
  int32_t layer() const override { return layer_; }
  const char* name() const override { return "counting"; }

  bool complete() const {
    for (const auto& items : runs_) {
      for (const int n : items) {
        if (n != 1) return false;
      }
    }
    return open_ == 0 && next_phase_ == static_cast<int32_t>(phases_.size()) + 1;
  }

 private:
  void spin() const {
    for (volatile int i = 0; i < work_;) i = i + 1;
  }

  const Phases phases_;
  const int64_t scratch_bytes_;
  const int work_;
  const int32_t layer_;
  int32_t next_phase_ = 0;
  std::atomic<int32_t> open_{0};
  std::vector<std::vector<int>> runs_;  // [phases * groups][items]
};

// Items that end only when as many threads as there are items are in one.
class MeetingJob : public Job {
 public:
  MeetingJob(std::vector<int32_t> num_items, std::atomic<int>& present, int expected)
      : num_items_(std::move(num_items)), present_(present), expected_(expected) {}
  void begin_phase(int32_t phase, int32_t* num_items) override {
    if (phase == 0) std::copy(num_items_.begin(), num_items_.end(), num_items);
  }
  void run_item(int32_t, int32_t, int32_t, Worker&) override {
    ++present_;
    while (present_ < expected_) std::this_thread::yield();
  }
  int64_t scratch_bytes() const override { return 0; }

 private:
  const std::vector<int32_t> num_items_;
  std::atomic<int>& present_;
  const int expected_;
};

void many_short_jobs_run_every_item_once(unsigned) {
  for (const int num_threads : {1, 2, 3}) {
    const auto pool = make_pool(places(num_threads));
    for (int i = 0; i < 5000; ++i) {
      CountingJob job(Phases{{i % 5}, {(i / 5) % 3 + 1}});
      pool->run(job);
      CHECK(job.complete() || i % 5 == 0);
    }
  }
}

void long_unequal_items_run_once(unsigned) {
  const auto pool = make_pool(places(3));
  for (int i = 0; i < 20; ++i) {
    CountingJob job(Phases{{200}, {1}, {50}}, 4096, 500 * i);
    pool->run(job);
    CHECK(job.complete());
  }
}

void a_phase_may_leave_groups_without_items(unsigned) {
  const auto pool = make_pool(places(4, 3));
  for (int i = 0; i < 500; ++i) {
    CountingJob job(Phases{{0, 0, 4}, {3, 0, 0}, {0, 1, 0}, {5, 5, 5}});
    pool->run(job);
    CHECK(job.complete());
  }
  CountingJob none(Phases{});
  pool->run(none);
  CHECK(none.complete());
}

void tickets_can_be_awaited_in_any_order(unsigned seed) {
  const auto pool = make_pool(places(3));
  std::mt19937 random(seed);
  for (int i = 0; i < 300; ++i) {
    std::vector<std::unique_ptr<CountingJob>> jobs;
    std::vector<Ticket> tickets;
    std::vector<size_t> order;
    for (size_t k = 0; k < 10; ++k) {
      jobs.push_back(std::make_unique<CountingJob>(Phases{{3}, {2}}, 0, 200));
      tickets.push_back(pool->submit(*jobs.back()));
      order.push_back(k);
    }
    std::shuffle(order.begin(), order.end(), random);
    for (const size_t k : order) {
      pool->wait(tickets[k]);
      CHECK(pool->is_done(tickets[k]));
      CHECK(jobs[k]->complete());
      pool->wait(tickets[k]);
    }
  }
}

void submit_goes_on_when_the_ring_is_full(unsigned) {
  for (const int num_threads : {1, 3}) {
    const auto pool = make_pool(places(num_threads));
    std::vector<std::unique_ptr<CountingJob>> jobs;
    std::vector<Ticket> tickets;
    for (int i = 0; i < 8 * Pool::kMaxJobs; ++i) {
      jobs.push_back(std::make_unique<CountingJob>(Phases{{4}, {1}}, 64, 300));
      tickets.push_back(pool->submit(*jobs.back()));
    }
    for (const Ticket& ticket : tickets) pool->wait(ticket);
    for (const auto& job : jobs) CHECK(job->complete());
  }
}

// More submitters than may help at once, each with several jobs in flight, scratch growing meanwhile.
void several_threads_may_submit(unsigned) {
  const auto pool = make_pool(places(3, 2));
  std::vector<std::thread> submitters;
  for (int s = 0; s < 6; ++s) {
    submitters.emplace_back([&pool, s] {
      for (int i = 0; i < 150; ++i) {
        const int64_t scratch = 64 * (i / 20) + 16 * s;
        CountingJob first(Phases{{3, 1}, {2, 2}}, scratch, 100, s);
        CountingJob second(Phases{{0, 5}}, scratch, 100, i % 40);
        CountingJob alone(Phases{{1, 1}}, scratch, 0, 3 * s);
        const Ticket a = pool->submit(first);
        const Ticket b = pool->submit(second);
        pool->run(alone, true);
        pool->wait(b);
        pool->wait(a);
        CHECK(first.complete() && second.complete() && alone.complete());
      }
    });
  }
  for (std::thread& submitter : submitters) submitter.join();
}

void every_thread_finds_work_while_items_are_left(unsigned) {
  for (const int num_groups : {1, 2, 4}) {
    const auto pool = make_pool(places(4, num_groups));
    for (int i = 0; i < 50; ++i) {
      // All in one group: the others' threads must steal.
      std::atomic<int> present{0};
      std::vector<int32_t> num_items(num_groups, 0);
      num_items[i % num_groups] = 4;
      MeetingJob job(num_items, present, 4);
      pool->run(job);
      CHECK(present == 4);
    }
  }
}

void a_job_begins_while_another_keeps_one_thread(unsigned) {
  const auto pool = make_pool(places(4));
  for (int i = 0; i < 200; ++i) {
    std::atomic<int> present{0};
    MeetingJob first({1}, present, 3);
    MeetingJob second({1}, present, 3);
    MeetingJob third({1}, present, 3);
    const Ticket tickets[] = {pool->submit(first), pool->submit(second), pool->submit(third)};
    // Three threads besides the submitter's.
    while (!pool->is_done(tickets[0])) std::this_thread::yield();
    for (const Ticket& ticket : tickets) pool->wait(ticket);
  }
}

void work_goes_on_while_nobody_waits(unsigned) {
  const auto pool = make_pool(places(2));
  for (int i = 0; i < 200; ++i) {
    CountingJob job(Phases{{1}, {1}, {3}, {1}});
    const Ticket ticket = pool->submit(job);
    while (!pool->is_done(ticket)) std::this_thread::yield();
    CHECK(job.complete());
    pool->wait(ticket);
  }
}

void one_thread_works_when_it_waits(unsigned) {
  const auto pool = make_pool(places(1));
  CountingJob job(Phases{{3}, {2}});
  const Ticket ticket = pool->submit(job);
  CHECK(!pool->is_done(ticket));
  pool->wait(ticket);
  CHECK(job.complete());
}

void threads_beyond_the_cpus_share_them(unsigned) {
  const auto pool = make_pool(places(8, 2));
  for (int i = 0; i < 300; ++i) {
    CountingJob job(Phases{{16, 3}, {2, 9}}, 128, 300);
    pool->run(job);
    CHECK(job.complete());
  }
}

void a_cpu_that_is_not_there_is_made_do_without(unsigned) {
  const auto pool = make_pool({{0, 0}, {CPU_SETSIZE - 1, 0}});
  std::atomic<int> present{0};
  MeetingJob job({2}, present, 2);
  pool->run(job);
}

void close_waits_for_the_jobs_in_flight(unsigned) {
  for (int i = 0; i < 100; ++i) {
    const auto pool = make_pool(places(3));
    CountingJob first(Phases{{5}, {2}}, 0, 1000);
    CountingJob second(Phases{{3}}, 0, 1000);
    const Ticket a = pool->submit(first);
    const Ticket b = pool->submit(second);
    pool->close();
    CHECK(pool->is_done(a) && pool->is_done(b));
    CHECK(first.complete() && second.complete());
    pool->wait(a);
    CountingJob late(Phases{{3}, {1}}, 64);
    CHECK(pool->is_done(pool->submit(late)));
    CHECK(late.complete());
    pool->close();
  }
}

void pools_come_and_go(unsigned) {
  for (int i = 0; i < 100; ++i) {
    const auto pool = make_pool(places(3, i % 3 + 1));
    if (i % 2 == 0) continue;  // never used
    CountingJob job(Phases{std::vector<int32_t>(i % 3 + 1, 4)});
    pool->run(job);
    CHECK(job.complete());
  }
}

void close_may_race_with_submitters(unsigned) {
  for (int i = 0; i < 30; ++i) {
    const auto pool = make_pool(places(2));
    std::vector<std::thread> submitters;
    for (int s = 0; s < 2; ++s) {
      submitters.emplace_back([&pool] {
        for (int k = 0; k < 50; ++k) {
          CountingJob job(Phases{{2}, {1}});
          pool->run(job);
          CHECK(job.complete());
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
    pool->close();
    for (std::thread& submitter : submitters) submitter.join();
  }
}

void a_forked_child_works_alone(unsigned) {
  const auto pool = make_pool(places(3));
  CountingJob before(Phases{{4}});
  pool->run(before);
  CountingJob in_flight(Phases{{64}}, 0, 2000);
  const Ticket ticket = pool->submit(in_flight);
  const pid_t child = fork();
  if (child == 0) {
    pool->wait(ticket);  // returns: it was the parent's
    CountingJob job(Phases{{4}, {3}}, 256);
    CHECK(pool->is_done(pool->submit(job)));
    CHECK(job.complete());
    pool->stats();
    pool->close();
    CountingJob after(Phases{{4}});
    pool->run(after);
    CHECK(after.complete());
    _exit(0);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  pool->wait(ticket);
  CHECK(in_flight.complete());
}

void statistics_count_every_item_and_byte(unsigned) {
  const auto pool = make_pool(places(3, 2));
  pool->reset_stats();
  for (int i = 0; i < 20; ++i) {
    CountingJob job(Phases{{4, 2}, {0, 1}}, 0, 5000, i % 2 == 0 ? 1 : 3);
    CountingJob uncounted(Phases{{4, 2}});
    CountingJob alone(Phases{{1, 0}}, 0, 0, 1);
    const Ticket ticket = pool->submit(job);
    pool->run(uncounted);
    pool->run(alone, true);
    pool->wait(ticket);
  }
  Stats stats = pool->stats();
  CHECK(stats.num_layers >= 4);
  for (int32_t layer = 0; layer < stats.num_layers; ++layer) {
    const bool odd = layer == 3;
    const bool used = layer == 1 || odd;
    const auto at = static_cast<size_t>(layer) * 2;
    CHECK(stats.items[at] == (used ? 10 * 4 + (odd ? 0 : 20) : 0));
    CHECK(stats.items[at + 1] == (used ? 10 * 3 : 0));
    CHECK(stats.bytes[at] == (used ? 10 * 406 + (odd ? 0 : 20 * 100) : 0));
    CHECK(stats.bytes[at + 1] == (used ? 10 * 301 : 0));
    CHECK((stats.busy_ns[at] > 0) == used);
    CHECK(stats.waiting_ns[at] >= 0 && stats.blocked_ns[layer] >= 0);
  }
  pool->reset_stats();
  stats = pool->stats();
  for (const auto* values : {&stats.items, &stats.bytes, &stats.busy_ns, &stats.waiting_ns, &stats.blocked_ns}) {
    CHECK(std::all_of(values->begin(), values->end(), [](int64_t n) { return n == 0; }));
  }
}

// One thread's item is long, so the other thread of the first phase waits for it.
class WaitingJob : public Job {
 public:
  void begin_phase(int32_t phase, int32_t* num_items) override { num_items[0] = phase == 0 ? 2 : 0; }
  void run_item(int32_t, int32_t, int32_t, Worker& worker) override {
    ++present_;
    while (present_ < 2) std::this_thread::yield();
    const bool caller = std::this_thread::get_id() == caller_;
    if (caller == caller_long_) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    worker.count_bytes(0, 1);
  }
  int64_t scratch_bytes() const override { return 0; }
  int32_t layer() const override { return 0; }

  explicit WaitingJob(bool caller_long) : caller_long_(caller_long) {}

 private:
  const std::thread::id caller_ = std::this_thread::get_id();
  const bool caller_long_;
  std::atomic<int> present_{0};
};

void statistics_tell_who_waited(unsigned) {
  const auto pool = make_pool(places(2));
  for (const bool caller_long : {true, false}) {
    pool->reset_stats();
    WaitingJob job(caller_long);
    pool->run(job);
    const Stats stats = pool->stats();
    CHECK(stats.busy_ns[0] >= 20'000'000);
    CHECK((stats.waiting_ns[0] > 15'000'000) == caller_long);
    CHECK((stats.blocked_ns[0] > 15'000'000) == !caller_long);
  }
}

void a_trace_holds_the_items_and_the_waits(unsigned) {
  const auto pool = make_pool(places(2));
  CountingJob untraced(Phases{{8}}, 0, 0, 5);
  pool->run(untraced);
  pool->start_trace(100);
  const int64_t begin = now_ns();
  CountingJob job(Phases{{2}, {2}}, 0, 30000, 7);
  pool->run(job);
  const int64_t end = now_ns();
  const std::vector<Event> events = pool->stop_trace();
  bool phases[2] = {};
  bool waited = false;
  for (const Event& event : events) {
    CHECK(event.layer == 7 && begin <= event.begin_ns && event.begin_ns <= event.end_ns && event.end_ns <= end);
    CHECK(event.thread >= 0);
    if (event.phase < 0) {
      CHECK(std::strcmp(event.name, "wait") == 0 && event.thread >= pool->num_threads());
      waited = true;
      continue;
    }
    CHECK(std::strcmp(event.name, "counting") == 0);
    phases[event.phase] = true;
  }
  CHECK(phases[0] && phases[1] && waited);
  CHECK(std::is_sorted(events.begin(), events.end(),
                       [](const Event& a, const Event& b) { return a.begin_ns < b.begin_ns; }));
  CHECK(pool->stop_trace().empty());

  pool->start_trace(4);
  for (int i = 0; i < 100; ++i) {
    CountingJob more(Phases{{4}}, 0, 100, i);
    pool->run(more);
  }
  for (const Event& event : pool->stop_trace()) CHECK(event.layer > 0);
}

void read_sums_the_words(unsigned) {
  const auto pool = make_pool(places(3, 2));
  std::vector<uint64_t> words((9 << 20) / 8 + 100);
  std::mt19937_64 random(2);
  for (uint64_t& word : words) word = random();
  for (const size_t num : {size_t{0}, size_t{1}, size_t{63}, size_t{64}, size_t{65}, words.size()}) {
    uint64_t sum = 0;
    for (size_t i = 0; i < num; ++i) sum += words[i];
    CHECK(pool->read(words.data(), static_cast<int64_t>(num * 8)) == sum);
  }
}

void functions_run_over_the_pool(unsigned) {
  const auto pool = make_pool(places(3, 2));
  std::vector<int> runs(100);
  for (const bool alone : {false, true}) {
    int* const first = runs.data();
    pool->run(
        100, [](const void* context, int32_t item, std::byte*) { ++(*static_cast<int* const*>(context))[item]; }, &first,
        64, alone);
  }
  CHECK(std::all_of(runs.begin(), runs.end(), [](int n) { return n == 2; }));
}

// Everything at once, drawn by a seed.
void a_random_mixture_runs_every_item_once(unsigned seed) {
  std::mt19937 random(seed);
  const auto draw = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (int round = 0; round < 12; ++round) {
    const int num_groups = 1 + draw(3);
    const auto pool = make_pool(places(num_groups + draw(4), num_groups));
    std::vector<std::pair<std::unique_ptr<CountingJob>, Ticket>> jobs;
    for (int i = 0; i < 400; ++i) {
      Phases phases(draw(4));
      for (auto& groups : phases) {
        for (int g = 0; g < num_groups; ++g) groups.push_back(draw(3) == 0 ? 0 : draw(12));
        groups[draw(num_groups)] += 1;  // all zero would end the job
      }
      jobs.emplace_back(std::make_unique<CountingJob>(phases, draw(4) == 0 ? draw(2000) : 0, draw(2000), draw(20) - 1),
                        Ticket{});
      jobs.back().second = pool->submit(*jobs.back().first, draw(10) == 0);
      if (draw(3) == 0) pool->wait(jobs[draw(static_cast<int>(jobs.size()))].second);
      if (draw(50) == 0) pool->start_trace(10);
      if (draw(50) == 0) pool->stop_trace();
      if (draw(20) == 0) pool->stats();
      if (draw(40) == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw(300)));
    }
    for (const auto& [job, ticket] : jobs) {
      pool->wait(ticket);
      CHECK(job->complete());
    }
  }
}

struct Test {
  const char* name;
  void (*run)(unsigned seed);
};

#define TEST(name) \
  Test { #name, name }

const Test kTests[] = {
    TEST(many_short_jobs_run_every_item_once),
    TEST(long_unequal_items_run_once),
    TEST(a_phase_may_leave_groups_without_items),
    TEST(tickets_can_be_awaited_in_any_order),
    TEST(submit_goes_on_when_the_ring_is_full),
    TEST(several_threads_may_submit),
    TEST(every_thread_finds_work_while_items_are_left),
    TEST(a_job_begins_while_another_keeps_one_thread),
    TEST(work_goes_on_while_nobody_waits),
    TEST(one_thread_works_when_it_waits),
    TEST(threads_beyond_the_cpus_share_them),
    TEST(a_cpu_that_is_not_there_is_made_do_without),
    TEST(close_waits_for_the_jobs_in_flight),
    TEST(pools_come_and_go),
    TEST(close_may_race_with_submitters),
    TEST(a_forked_child_works_alone),
    TEST(statistics_count_every_item_and_byte),
    TEST(statistics_tell_who_waited),
    TEST(a_trace_holds_the_items_and_the_waits),
    TEST(read_sums_the_words),
    TEST(functions_run_over_the_pool),
    TEST(a_random_mixture_runs_every_item_once),
};

}  // namespace
}  // namespace hybridgen

int main(int argc, char** argv) {
  const std::vector<std::string> names(argv + 1, argv + argc);
  const double seconds = names.empty() ? 0 : std::atof(names[0].c_str());  // 0: a name
  const int64_t end = hybridgen::now_ns() + static_cast<int64_t>(seconds * 1e9);
  int round = 0;
  int num_run = 0;
  do {
    for (const auto& test : hybridgen::kTests) {
      if (seconds == 0 && !names.empty() && std::find(names.begin(), names.end(), test.name) == names.end()) continue;
      const int64_t begin = hybridgen::now_ns();
      alarm(60);  // a test that hangs is killed; its name stands in the line that has no time
      std::printf("%d %s", round, test.name);
      std::fflush(stdout);
      test.run(static_cast<unsigned>(round));
      std::printf(" %.2f s\n", static_cast<double>(hybridgen::now_ns() - begin) / 1e9);
      ++num_run;
    }
    ++round;
  } while (hybridgen::now_ns() < end);
  return num_run > 0 ? 0 : 1;
}
