#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

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
  /// read.
  virtual Item read(int64_t index, std::vector<uint8_t>& buffer) const = 0;

 protected:
  void check_index(int64_t index) const;
};

/// A file mapped into memory, read only.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

/// Byte ranges of mapped files: the members of tar shards.
class ShardSource : public Source {
 public:
  /// Image i is `sizes[i]` bytes at `offsets[i]` of the file `paths[shard[i]]`. Every range is
  /// checked against its file's size here, once.
  ShardSource(const std::vector<std::string>& paths, std::vector<int32_t> shard,
              std::vector<int64_t> offsets, std::vector<int64_t> sizes);
  int64_t size() const override { return static_cast<int64_t>(offsets_.size()); }
  Item read(int64_t index, std::vector<uint8_t>& buffer) const override;

 private:
  std::vector<std::unique_ptr<MappedFile>> files_;
  std::vector<int32_t> shard_;
  std::vector<int64_t> offsets_, sizes_;
};

/// One file per image.
class FileSource : public Source {
 public:
  explicit FileSource(std::vector<std::string> paths) : paths_(std::move(paths)) {}
  int64_t size() const override { return static_cast<int64_t>(paths_.size()); }
  Item read(int64_t index, std::vector<uint8_t>& buffer) const override;

 private:
  std::vector<std::string> paths_;
};

/// A uint8 array [N, H, W, C], C = 1 or 3, kept alive by `owner` and not copied.
class ArraySource : public Source {
 public:
  ArraySource(const uint8_t* data, int64_t count, int64_t height, int64_t width, int64_t channels,
              std::shared_ptr<const void> owner);
  int64_t size() const override { return count_; }
  Item read(int64_t index, std::vector<uint8_t>& buffer) const override;

 private:
  const uint8_t* data_;
  int64_t count_, height_, width_, channels_;
  std::shared_ptr<const void> owner_;
};

/// Images of any sizes, fetched by a function.
class FunctionSource : public Source {
 public:
  /// Fetches one image, as `read` of a source does; called from many threads at once.
  using Read = std::function<Item(int64_t index, std::vector<uint8_t>& buffer)>;

  FunctionSource(Read read, int64_t count);
  int64_t size() const override { return count_; }
  Item read(int64_t index, std::vector<uint8_t>& buffer) const override;

 private:
  Read read_;
  int64_t count_;
};

}  // namespace bagssl
