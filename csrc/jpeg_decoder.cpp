#ifdef BAGSSL_WITH_JPEG

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

// jpeglib.h needs size_t and FILE declared before it.
#include <jerror.h>
#include <jpeglib.h>

#include "jpeg.h"

namespace bagssl {
namespace {

constexpr int kExifMarker = JPEG_APP0 + 1;
constexpr int64_t kRowsPerCall = 16;
// Smooth upsampling looks one chroma sample, up to two pixels, beyond a pixel.
constexpr int64_t kMargin = 2;
// Skipping rows restarts the upsampler; below this it gains nothing.
constexpr int64_t kWorthSkipping = 32;

/// libjpeg's error manager with a way back to the caller and the two warnings that matter.
struct ErrorManager {
  jpeg_error_mgr base;  // first: libjpeg hands back a pointer to it
  jmp_buf back;
  bool data_ended;    // the file was over before the image was
  bool data_missing;  // and pixels were made up in its place
  int max_scans;
  bool has_too_many_scans;
};

ErrorManager* manager_of(j_common_ptr info) { return reinterpret_cast<ErrorManager*>(info->err); }

void jump_back(j_common_ptr info) { longjmp(manager_of(info)->back, 1); }

void note_warning(j_common_ptr info, int level) {
  if (level == -1 && info->err->msg_code == JWRN_HIT_MARKER) manager_of(info)->data_missing = true;
}

void print_nothing(j_common_ptr) {}

/// Called while a file of several scans is read, before any pixel is made.
void check_scans(j_common_ptr info) {
  ErrorManager& errors = *manager_of(info);
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number <= errors.max_scans) return;
  errors.has_too_many_scans = true;
  jump_back(info);
}

// A source manager for bytes in memory. Where they end, an end marker is put in their place, as
// libjpeg's own does, but quietly: a file that lacks only its end marker is complete.
void begin_source(j_decompress_ptr) {}

boolean fill_source(j_decompress_ptr info) {
  static const JOCTET kEnd[2] = {0xFF, JPEG_EOI};
  manager_of(reinterpret_cast<j_common_ptr>(info))->data_ended = true;
  info->src->next_input_byte = kEnd;
  info->src->bytes_in_buffer = sizeof(kEnd);
  return TRUE;
}

void skip_source(j_decompress_ptr info, long count) {
  if (count <= 0) return;
  if (static_cast<size_t>(count) > info->src->bytes_in_buffer) {
    fill_source(info);
    return;
  }
  info->src->next_input_byte += count;
  info->src->bytes_in_buffer -= static_cast<size_t>(count);
}

/// Ink to light as Pillow does it. Files store inks inverted (Adobe's habit): 255 is no ink.
void inks_to_rgb(const uint8_t* inks, int64_t width, uint8_t* rgb) {
  for (int64_t x = 0; x < width; ++x, inks += 4, rgb += 3) {
    const int light = inks[3];
    for (int c = 0; c < 3; ++c) {
      const int product = (255 - inks[c]) * light + 128;
      rgb[c] = static_cast<uint8_t>(std::max(0, light - (((product >> 8) + product) >> 8)));
    }
  }
}

ImageSize upright_size(ImageSize stored, int orientation) {
  return orientation >= 5 ? ImageSize{stored.width, stored.height} : stored;
}

/// Where upright pixel (y, x) lies in the stored image, for EXIF's orientation.
void to_stored(int orientation, ImageSize stored, int64_t y, int64_t x, int64_t* stored_y,
               int64_t* stored_x) {
  const bool swapped = orientation >= 5;
  int64_t sy = swapped ? x : y, sx = swapped ? y : x;
  const bool flip_y = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const bool flip_x = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  *stored_y = flip_y ? stored.height - 1 - sy : sy;
  *stored_x = flip_x ? stored.width - 1 - sx : sx;
}

Box stored_box(int orientation, ImageSize stored, const Box& box) {
  int64_t y0, x0, y1, x1;
  to_stored(orientation, stored, box.top, box.left, &y0, &x0);
  to_stored(orientation, stored, box.top + box.height - 1, box.left + box.width - 1, &y1, &x1);
  return {std::min(y0, y1), std::min(x0, x1), std::max(y0, y1) - std::min(y0, y1) + 1,
          std::max(x0, x1) - std::min(x0, x1) + 1};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

struct JpegDecoder::State {
  jpeg_decompress_struct info;
  ErrorManager errors;
  jpeg_source_mgr source;
  jpeg_progress_mgr progress = {};

  std::string message() {
    char text[JMSG_LENGTH_MAX];
    (*errors.base.format_message)(reinterpret_cast<j_common_ptr>(&info), text);
    return text;
  }

  // The functions below call libjpeg, which leaves them by longjmp on an error. They hold nothing
  // that has a destructor, and return false after such a jump.

  bool read_header(const uint8_t* data, size_t size) {
    if (setjmp(errors.back)) return false;
    jpeg_abort_decompress(&info);
    errors.data_ended = errors.data_missing = errors.has_too_many_scans = false;
    errors.base.num_warnings = 0;
    source.next_input_byte = data;
    source.bytes_in_buffer = size;
    info.src = &source;
    jpeg_read_header(&info, TRUE);
    return true;
  }

  /// Gives back what decoding the image took, which for a progressive one is three times its size.
  void finish() {
    if (setjmp(errors.back)) return;
    jpeg_abort_decompress(&info);
  }

  bool start(int denominator) {
    if (setjmp(errors.back)) return false;
    info.scale_num = 1;
    info.scale_denom = static_cast<unsigned>(denominator);
    info.dct_method = JDCT_ISLOW;
    info.do_fancy_upsampling = TRUE;
    const bool inks = info.jpeg_color_space == JCS_CMYK || info.jpeg_color_space == JCS_YCCK;
    info.out_color_space = inks ? JCS_CMYK : JCS_RGB;
    return jpeg_start_decompress(&info);
  }

  bool crop(JDIMENSION* left, JDIMENSION* width) {
    if (setjmp(errors.back)) return false;
    jpeg_crop_scanline(&info, left, width);
    return true;
  }

  /// Passes over rows, without their arithmetic, until `row` is next.
  bool skip_to(JDIMENSION row) {
    if (setjmp(errors.back)) return false;
    while (info.output_scanline < row) {
      if (jpeg_skip_scanlines(&info, row - info.output_scanline) == 0) return false;
    }
    return true;
  }

  /// Reads the next rows to `out`, `stride` bytes apart, by way of `inks` for CMYK.
  bool read_rows(uint8_t* out, int64_t stride, int64_t rows, uint8_t* inks) {
    if (setjmp(errors.back)) return false;
    const int64_t width = info.output_width;
    uint8_t* lines[kRowsPerCall];
    for (int64_t done = 0; done < rows;) {
      const int64_t needed = std::min(kRowsPerCall, rows - done);
      for (int64_t i = 0; i < needed; ++i) {
        lines[i] = inks ? inks + i * width * 4 : out + (done + i) * stride;
      }
      const int64_t got = jpeg_read_scanlines(&info, lines, static_cast<JDIMENSION>(needed));
      if (got == 0) return false;
      for (int64_t i = 0; inks && i < got; ++i) {
        inks_to_rgb(lines[i], width, out + (done + i) * stride);
      }
      done += got;
    }
    return true;
  }
};

JpegDecoder::JpegDecoder() : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.info.err = jpeg_std_error(&s.errors.base);
  s.errors.base.error_exit = jump_back;
  s.errors.base.emit_message = note_warning;
  s.errors.base.output_message = print_nothing;
  if (setjmp(s.errors.back)) throw std::runtime_error("libjpeg: " + s.message());
  jpeg_create_decompress(&s.info);
  jpeg_save_markers(&s.info, kExifMarker, 0xFFFF);
  s.source.init_source = begin_source;
  s.source.fill_input_buffer = fill_source;
  s.source.skip_input_data = skip_source;
  s.source.resync_to_restart = jpeg_resync_to_restart;
  s.source.term_source = begin_source;
  s.progress.progress_monitor = check_scans;
  s.info.progress = &s.progress;
}

JpegDecoder::~JpegDecoder() { jpeg_destroy_decompress(&state_->info); }

ImageSize JpegDecoder::open(const uint8_t* data, size_t size, int max_scans) {
  State& s = *state_;
  s.errors.max_scans = max_scans;
  if (!s.read_header(data, size)) {
    throw std::runtime_error(s.errors.data_ended ? "truncated JPEG: it ends within its header"
                                                 : "damaged JPEG: " + s.message());
  }
  orientation_ = 1;
  for (jpeg_saved_marker_ptr marker = s.info.marker_list; marker; marker = marker->next) {
    if (marker->marker != kExifMarker || !is_exif(marker->data, marker->data_length)) continue;
    orientation_ = exif_orientation(marker->data, marker->data_length);
    break;
  }
  stored_ = {s.info.image_height, s.info.image_width};
  has_end_marker_ = size >= 2 && data[size - 2] == 0xFF && data[size - 1] == JPEG_EOI;
  return upright_size(stored_, orientation_);
}

Region JpegDecoder::decode(const Box& box, int denominator) {
  State& s = *state_;
  if (!s.start(denominator)) fail();
  const ImageSize scaled = {s.info.output_height, s.info.output_width};
  const ImageSize turned = upright_size(scaled, orientation_);

  // The scaled pixels that the box touches.
  Box needed;
  needed.top = box.top / denominator;
  needed.left = box.left / denominator;
  needed.height = std::min(ceil_div(box.top + box.height, denominator), turned.height) - needed.top;
  needed.width = std::min(ceil_div(box.left + box.width, denominator), turned.width) - needed.left;

  Region region = decode_stored(stored_box(orientation_, scaled, needed));
  region.denominator = denominator;
  if (orientation_ == 1) return region;

  uint8_t* upright = upright_.take(static_cast<size_t>(needed.height * needed.width * 3));
  for (int64_t y = 0; y < needed.height; ++y) {
    for (int64_t x = 0; x < needed.width; ++x) {
      int64_t from_y, from_x;
      to_stored(orientation_, scaled, needed.top + y, needed.left + x, &from_y, &from_x);
      std::memcpy(upright + (y * needed.width + x) * 3,
                  region.view.data + (from_y - region.top) * region.view.row_stride +
                      (from_x - region.left) * 3,
                  3);
    }
  }
  region.view = {upright, needed.height, needed.width, needed.width * 3};
  region.top = needed.top;
  region.left = needed.left;
  return region;
}

Region JpegDecoder::decode_stored(const Box& box) {
  State& s = *state_;
  const int64_t height = s.info.output_height, full_width = s.info.output_width;

  int64_t left = 0, width = full_width;
  JDIMENSION crop_left = static_cast<JDIMENSION>(std::max<int64_t>(0, box.left - kMargin));
  JDIMENSION crop_width = static_cast<JDIMENSION>(
      std::min(full_width, box.left + box.width + kMargin) - static_cast<int64_t>(crop_left));
  if (crop_width < full_width) {
    if (!s.crop(&crop_left, &crop_width)) fail();
    left = crop_left;
    width = s.info.output_width;
  }
  int64_t top = std::max<int64_t>(0, box.top - kMargin);
  if (top < kWorthSkipping) top = 0;
  const int64_t bottom = box.top + box.height;
  const bool has_inks = s.info.out_color_space == JCS_CMYK;
  const int64_t stride = width * 3;
  uint8_t* const pixels = pixels_.take(static_cast<size_t>((bottom - top) * stride));
  uint8_t* const inks =
      has_inks ? inks_.take(static_cast<size_t>(kRowsPerCall * width * 4)) : nullptr;
  bool good =
      s.skip_to(static_cast<JDIMENSION>(top)) && s.read_rows(pixels, stride, bottom - top, inks);
  // What follows the last row is not decoded, unless the file may end before the image does.
  if (good && !has_end_marker_ && bottom < height) {
    good = s.skip_to(static_cast<JDIMENSION>(height - 1)) &&
           s.read_rows(spare_row_.take(static_cast<size_t>(stride)), stride, 1, inks);
  }
  if (!good) fail();
  check_complete();
  s.finish();

  Region region;
  region.view = {pixels, bottom - top, width, stride};
  region.top = top;
  region.left = left;
  return region;
}

void JpegDecoder::fail() {
  const ErrorManager& errors = state_->errors;
  const std::string text = errors.has_too_many_scans ? too_many_scans(errors.max_scans)
                                                     : "damaged JPEG: " + state_->message();
  state_->finish();
  throw std::runtime_error(text);
}

void JpegDecoder::check_complete() {
  const ErrorManager& errors = state_->errors;
  if (errors.data_ended && errors.data_missing) {
    throw std::runtime_error("truncated JPEG: the file ends before the image does");
  }
}

}  // namespace bagssl

#endif  // BAGSSL_WITH_JPEG
