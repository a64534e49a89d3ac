// Attention on the pool, without Python: random batches, several submissions in flight from several threads, compared
// bit for bit with one thread's. Argument: seconds (default 5). Built with sanitizers by `make sanitize`.

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../kernels/csrc/isa.h"
#include "../../../kernels/csrc/page_copy.h"
#include "../../../kernels/csrc/pool.h"
#include "../../../kernels/csrc/step.h"

namespace hybridgen {
namespace {

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

std::vector<Pool::Place> places(int num_threads, int num_groups) {
  cpu_set_t set;
  sched_getaffinity(0, sizeof(set), &set);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  std::vector<Pool::Place> places;
  for (int i = 0; i < num_threads; ++i) {
    places.push_back({cpus[static_cast<size_t>(i) % cpus.size()], i * num_groups / num_threads});
  }
  return places;
}

uint16_t bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>(bits >> 16);
}

struct Batch {  // exactly as large as it says: what reads past an end is found by AddressSanitizer
  explicit Batch(unsigned seed) {
    std::mt19937 random(seed);
    auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
    const int dims[] = {64, 80, 128, 2 * pick(1, 64)};
    layout = {2, pick(1, 3), dims[pick(0, 3)], 16 * pick(1, 3), Dtype::bfloat16, 0};
    layout.page_stride = layout.head_elements() * layout.num_kv_heads * layout.num_layers;
    num_heads = layout.num_kv_heads * pick(1, 8);
    const int num_seqs = pick(1, 4);
    query_begin.push_back(0);
    for (int i = 0; i < num_seqs; ++i) {
      kv_len.push_back(pick(0, 3) == 0 ? pick(600, 1800) : pick(0, 100));
      query_begin.push_back(query_begin.back() + (pick(0, 1) == 0 ? 1 : std::min(kv_len.back(), pick(0, 40))));
      max_pages = std::max(max_pages, (kv_len.back() + layout.page_size - 1) / layout.page_size);
    }
    num_pages = std::max(1, num_seqs * max_pages);
    std::vector<int32_t> order(static_cast<size_t>(num_pages));
    for (int i = 0; i < num_pages; ++i) order[static_cast<size_t>(i)] = i;
    std::shuffle(order.begin(), order.end(), random);
    block_table.assign(order.begin(), order.begin() + num_seqs * max_pages);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<uint16_t>& values, int64_t count) {
      values.resize(static_cast<size_t>(count));
      for (uint16_t& value : values) value = bfloat16(normal(random));
    };
    fill(k, num_pages * layout.page_stride);
    fill(v, num_pages * layout.page_stride);
    fill(q, int64_t{query_begin.back()} * num_heads * layout.head_dim);
  }

  std::unique_ptr<Step> step(Pool& pool) {
    return std::make_unique<Step>(pool, layout, reinterpret_cast<std::byte*>(k.data()),
                                  reinterpret_cast<std::byte*>(v.data()), 0, num_pages, num_pages,
                                  static_cast<int32_t>(kv_len.size()), query_begin.data(), kv_len.data(),
                                  block_table.data(), max_pages, num_heads, 0.1f);
  }

  Layout layout{};
  int32_t num_heads = 0;
  int32_t max_pages = 0;
  int32_t num_pages = 0;
  std::vector<int32_t> query_begin, kv_len, block_table;
  std::vector<uint16_t> k, v, q;
};

struct Result {
  explicit Result(const Batch& batch)
      : out(batch.q.size()), lse(static_cast<size_t>(batch.query_begin.back()) * static_cast<size_t>(batch.num_heads)) {}
  Step::Queries queries(const Batch& batch, int32_t layer, int32_t window) {
    const int64_t stride = int64_t{batch.num_heads} * batch.layout.head_dim;
    return {layer,  reinterpret_cast<const std::byte*>(batch.q.data()), stride, reinterpret_cast<std::byte*>(out.data()),
            stride, true, lse.data(), window, 0.0f};
  }
  bool operator==(const Result& other) const {
    return std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
           std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
  }
  std::vector<float> out, lse;
};

void attend_in_flight(Pool& pool, Pool& alone, unsigned seed) {
  Batch batch(seed);
  const auto reference = batch.step(alone);
  const auto step = batch.step(pool);
  const auto num_pages = static_cast<size_t>(batch.num_pages);
  std::vector<uint8_t> labels(kNumRoles * num_pages);
  for (size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<uint8_t>(i % 2);
  std::vector<float> heat(2 * num_pages);
  PageMemory memory(batch.num_pages, labels.data(), heat.data(), {{}, {50.0, 100.0}});
  step->keep_memory(memory);
  std::vector<std::thread> threads;
  for (int t = 0; t < 2; ++t) {
    threads.emplace_back([&] {
      for (const int32_t window : {0, 50}) {
        std::vector<std::unique_ptr<Result>> results;
        std::vector<std::unique_ptr<Step::Attend>> in_flight;
        for (const int32_t layer : {0, 1, 0}) {
          results.push_back(std::make_unique<Result>(batch));
          in_flight.push_back(step->submit(results.back()->queries(batch, layer, window)));
        }
        for (const int32_t layer : {0, 1}) {
          Result expected(batch);
          reference->attend(expected.queries(batch, layer, window));
          in_flight[static_cast<size_t>(layer)]->wait();
          CHECK(*results[static_cast<size_t>(layer)] == expected);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Each of the two threads attended in three layers, to the same keys.
  const PageMemory::Counts counts = memory.take();
  CHECK((counts.bytes[0] + counts.bytes[1]) % 6 == 0);
  CHECK(memory.take().bytes[0] == 0);

  // Stored and copied pages hold what was put there.
  const auto width = static_cast<size_t>(batch.layout.num_kv_heads * batch.layout.head_dim);
  std::vector<uint16_t> rows(static_cast<size_t>(batch.query_begin.back()) * width, 7);
  const auto* source = reinterpret_cast<const std::byte*>(rows.data());
  step->store(1, source, static_cast<int64_t>(width), source, static_cast<int64_t>(width));
  std::vector<uint16_t> k(batch.k.size()), v(batch.v.size());
  std::vector<int32_t> pages(static_cast<size_t>(batch.num_pages));
  for (size_t i = 0; i < pages.size(); ++i) pages[i] = static_cast<int32_t>(i);
  PageCopy copy(pool, {reinterpret_cast<std::byte*>(batch.k.data()), reinterpret_cast<std::byte*>(batch.v.data())},
                {reinterpret_cast<std::byte*>(k.data()), reinterpret_cast<std::byte*>(v.data())}, pages, pages,
                batch.layout.page_stride * 2, batch.layout.page_stride * 2, batch.layout.page_stride * 2);
  pool.run(copy);
  CHECK(k == batch.k);
  CHECK(v == batch.v);
}

}  // namespace
}  // namespace hybridgen

int main(int argc, char** argv) {
  using hybridgen::Pool;
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(argc > 1 ? std::atof(argv[1]) : 5.0);
  unsigned seed = std::random_device{}();
  std::printf("first seed %u\n", seed);
  unsigned rounds = 0;
  do {
    for (const std::string& isa : hybridgen::supported_isas()) {
      const hybridgen::Kernels& kernels = hybridgen::find_kernels(isa);
      Pool pool(hybridgen::places(4, 2), kernels);
      Pool alone(hybridgen::places(1, 1), kernels);
      std::printf("%s, seed %u\n", isa.c_str(), seed);
      std::fflush(stdout);
      hybridgen::attend_in_flight(pool, alone, seed++);
      ++rounds;
    }
  } while (Clock::now() < end);
  std::printf("%u rounds\n", rounds);
  return 0;
}
