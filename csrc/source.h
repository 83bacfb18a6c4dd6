#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "byte_buffer.h"
#include "file.h"

namespace bagssl {

/// One image as it is stored: the bytes of a file, or pixels.
struct Item {
  const uint8_t* data = nullptr;
  size_t size = 0;                              // bytes, of a file
  int64_t height = 0, width = 0, channels = 0;  // of pixels [H, W, C]; 0 for a file

  bool is_pixels() const { return channels > 0; }
};

/// Random access to a data set's images. Reading is const and safe from many threads.
class Source {
 public:
  virtual ~Source() = default;
  virtual int64_t size() const = 0;

  /// Image `index`; its data is valid as long as the source and until the next use of `buffer`,
  /// which is reused from call to call. Throws std::runtime_error with the reason if it cannot be
  /// read, or if its file has more than `max_bytes`: no memory is allocated for that.
  virtual Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const = 0;

 protected:
  void check_index(int64_t index) const;
};

/// Byte ranges of files: the members of tar shards.
class ShardSource : public Source {
 public:
  /// Image i is `sizes[i]` bytes at `offsets[i]` of the file `paths[shard[i]]`. Every range is
  /// checked against its file's size here, once.
  ShardSource(const std::vector<std::string>& paths, std::vector<int32_t> shard,
              std::vector<int64_t> offsets, std::vector<int64_t> sizes);
  int64_t size() const override { return static_cast<int64_t>(offsets_.size()); }
  Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const override;

 private:
  std::vector<std::unique_ptr<const DataFile>> files_;
  std::vector<int32_t> shard_;
  std::vector<int64_t> offsets_, sizes_;
};

/// One file per image.
class FileSource : public Source {
 public:
  explicit FileSource(std::vector<std::string> paths) : paths_(std::move(paths)) {}
  int64_t size() const override { return static_cast<int64_t>(paths_.size()); }
  Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const override;

 private:
  std::vector<std::string> paths_;
};

/// Images of one size, uint8 [N, H, W, C], C = 1 or 3.
struct ArrayShape {
  int64_t count = 0, height = 0, width = 0, channels = 0;

  int64_t image_bytes() const { return height * width * channels; }
  /// Throws std::invalid_argument for a shape of other arrays, or of more than 2^62 bytes.
  void check() const;
};

/// An array in memory, kept alive by `owner` and not copied.
class ArraySource : public Source {
 public:
  ArraySource(const uint8_t* data, ArrayShape shape, std::shared_ptr<const void> owner);
  int64_t size() const override { return shape_.count; }
  Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const override;

 private:
  const uint8_t* data_;
  ArrayShape shape_;
  std::shared_ptr<const void> owner_;
};

/// An array in a file, from byte `offset` on.
class ArrayFileSource : public Source {
 public:
  ArrayFileSource(std::string path, int64_t offset, ArrayShape shape);
  int64_t size() const override { return shape_.count; }
  Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const override;

 private:
  DataFile file_;
  int64_t offset_;
  ArrayShape shape_;
};

/// Images of any sizes, fetched by a function.
class FunctionSource : public Source {
 public:
  /// Fetches one image, as `read` of a source does; called from many threads at once.
  using Read = std::function<Item(int64_t index, ByteBuffer& buffer, int64_t max_bytes)>;

  FunctionSource(Read read, int64_t count);
  int64_t size() const override { return count_; }
  Item read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const override;

 private:
  Read read_;
  int64_t count_;
};

/// Throws std::runtime_error for a file of more than `max_bytes`.
void check_bytes(int64_t bytes, int64_t max_bytes);

}  // namespace bagssl
