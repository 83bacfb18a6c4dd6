// The loop of patch_rows.h, once per SIMD level: see simd_levels.h.

template <typename T>
void cut(const PatchRows& rows, int64_t first, int64_t last, T* __restrict out) {
  const T center = static_cast<T>(rows.center);
  for (int64_t i = first; i < last; ++i) {
    for (int64_t line = 0; line < rows.lines; ++line) {
      const uint8_t* from = rows.pixels + rows.offsets[i] + line * rows.stride;
      T* to = out + (i * rows.lines + line) * rows.length;
      for (int64_t j = 0; j < rows.length; ++j) to[j] = static_cast<T>(from[j]) - center;
    }
  }
}
