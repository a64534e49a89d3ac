// Moves pages between tiers: plain copies, shared out over the pool.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pool.h"

namespace hybridgen {

class PageCopy final : public Job {
 public:
  using Halves = std::array<std::byte*, 2>;  // K and V of page 0

  // Page sources[i] of one tier becomes page targets[i] of the other. A half of a page has `half_bytes`; strides are bytes
  // from a page to the next.
  PageCopy(const Pool& pool, const Halves& source, const Halves& target, const std::vector<int32_t>& sources,
           const std::vector<int32_t>& targets, int64_t half_bytes, int64_t source_stride, int64_t target_stride);

  void begin_phase(int32_t phase, int32_t* num_items) override;
  void run_item(int32_t phase, int32_t group, int32_t item, Worker& worker) override;
  int64_t scratch_bytes() const override { return 0; }
  const char* name() const override { return "copy pages"; }

 private:
  const Pool& pool_;
  const Halves source_;
  const Halves target_;
  const std::vector<int32_t>& sources_;
  const std::vector<int32_t>& targets_;
  const int64_t half_bytes_;
  const int64_t source_stride_;
  const int64_t target_stride_;
};

}  // namespace hybridgen
