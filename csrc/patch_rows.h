#pragma once

#include <cstdint>

#include "thread_pool.h"

namespace bagssl {

/// Patches of bytes: `lines` stretches of `length` bytes, `stride` apart, from each offset on.
struct PatchRows {
  const uint8_t* pixels;
  const int64_t* offsets;  // [count]
  int64_t count, lines, length, stride;
  int center;
};

/// out [count, lines, length] = byte - center.
template <typename T>
void patch_rows(const PatchRows& rows, T* out, ThreadPool& pool);

}  // namespace bagssl
