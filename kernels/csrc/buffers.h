// Memory that grows and stays, for who submits work often: taken for a job, given back when it is done.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace hybridgen {

class Buffer {  // grows and stays; not zeroed, so that who works on it touches it first; 64-byte aligned
 public:
  std::byte* data() const { return bytes_.get(); }
  void reserve(int64_t size) {
    if (size <= size_) return;
    bytes_.reset(static_cast<std::byte*>(::operator new(static_cast<size_t>(size), kAlignment)));
    size_ = size;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(std::byte* bytes) const { ::operator delete(bytes, kAlignment); }
  };
  std::unique_ptr<std::byte, Delete> bytes_;
  int64_t size_ = 0;
};

class Buffers {  // as many as were in use at once; only submitters come here, so the lock is hardly ever contended
 public:
  Buffer take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return {};
    Buffer buffer = std::move(free_.back());
    free_.pop_back();
    return buffer;
  }
  void give(Buffer buffer) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(buffer));
  }

 private:
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

}  // namespace hybridgen
