#include "page_copy.h"

#include <cstring>

namespace hybridgen {

PageCopy::PageCopy(const Pool& pool, const Halves& source, const Halves& target, const std::vector<int32_t>& sources,
                   const std::vector<int32_t>& targets, int64_t half_bytes, int64_t source_stride, int64_t target_stride)
    : pool_(pool),
      source_(source),
      target_(target),
      sources_(sources),
      targets_(targets),
      half_bytes_(half_bytes),
      source_stride_(source_stride),
      target_stride_(target_stride) {}

void PageCopy::begin_phase(int32_t phase, int32_t* num_items) {
  const int32_t num_groups = pool_.num_groups();
  const int32_t total = phase == 0 ? static_cast<int32_t>(sources_.size()) : 0;
  for (int32_t i = 0; i < num_groups; ++i) num_items[i] = (total + num_groups - 1 - i) / num_groups;
}

void PageCopy::run_item(int32_t, int32_t group, int32_t item, Worker&) {
  const auto index = static_cast<size_t>(item * pool_.num_groups() + group);
  for (size_t half = 0; half < 2; ++half) {
    std::memcpy(target_[half] + targets_[index] * target_stride_, source_[half] + sources_[index] * source_stride_,
                static_cast<size_t>(half_bytes_));
  }
}

}  // namespace hybridgen
