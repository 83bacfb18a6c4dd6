#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace bagssl {

/// Bytes that a thread keeps from image to image, with anything in them: fresh pages cost more than
/// what fills them. Those of a large image are given back by the first small one after it.
class ByteBuffer {
 public:
  /// At least so many bytes; what was in the buffer is lost.
  uint8_t* take(size_t bytes) {
    const bool is_wasteful = capacity_ > kKept && bytes <= kKept;
    if (bytes > capacity_ || is_wasteful) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(static_cast<uint8_t*>(std::malloc(bytes > 0 ? bytes : 1)));
      if (!memory_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return memory_.get();
  }

  const uint8_t* data() const { return memory_.get(); }

 private:
  static constexpr size_t kKept = size_t{16} << 20;

  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  size_t capacity_ = 0;
};

}  // namespace bagssl
