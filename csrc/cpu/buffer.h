// Memory that a call works with.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace hitsr_fast {

// Uninitialised memory for `count` elements, on a cache line.
template <typename E>
class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_((static_cast<size_t>(count) * sizeof(E) + 64) / 64 * 64) {
    memory_.reset(static_cast<E*>(std::aligned_alloc(64, bytes_)));
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  static Buffer zeros(int64_t count) {
    Buffer found(count);
    std::memset(static_cast<void*>(found.at(0)), 0, found.bytes_);
    return found;
  }
  E* at(int64_t i) const { return memory_.get() + i; }

 private:
  struct Free {
    void operator()(E* memory) const { std::free(memory); }
  };
  size_t bytes_;
  std::unique_ptr<E, Free> memory_;
};

}  // namespace hitsr_fast
