#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace bagssl {

/// Memory that a thread keeps from call to call: fresh pages cost more than what fills them.
class Workspace {
 public:
  /// At least so many floats, at a cache line's start, with anything in them.
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (4 * floats + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace bagssl
