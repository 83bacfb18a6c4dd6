#include "source.h"

#include <stdexcept>

namespace bagssl {

void check_bytes(int64_t bytes, int64_t max_bytes) {
  if (bytes > max_bytes) {
    throw std::runtime_error("a file of " + std::to_string(bytes) + " bytes exceeds the limit of " +
                             std::to_string(max_bytes) + " bytes (raise max_bytes)");
  }
}

void Source::check_index(int64_t index) const {
  if (index < 0 || index >= size()) {
    throw std::invalid_argument("image " + std::to_string(index) + " of a source of " +
                                std::to_string(size()) + " images");
  }
}

ShardSource::ShardSource(const std::vector<std::string>& paths, std::vector<int32_t> shard,
                         std::vector<int64_t> offsets, std::vector<int64_t> sizes)
    : shard_(std::move(shard)), offsets_(std::move(offsets)), sizes_(std::move(sizes)) {
  if (shard_.size() != offsets_.size() || sizes_.size() != offsets_.size()) {
    throw std::invalid_argument("shard, offsets and sizes differ in length");
  }
  for (const std::string& path : paths) files_.push_back(std::make_unique<const DataFile>(path));
  for (size_t i = 0; i < offsets_.size(); ++i) {
    if (shard_[i] < 0 || shard_[i] >= static_cast<int32_t>(files_.size())) {
      throw std::invalid_argument("image " + std::to_string(i) + " names shard " +
                                  std::to_string(shard_[i]) + " of " +
                                  std::to_string(files_.size()));
    }
    const int64_t end = files_[shard_[i]]->size();
    if (offsets_[i] < 0 || sizes_[i] < 0 || offsets_[i] > end || sizes_[i] > end - offsets_[i]) {
      throw std::invalid_argument("image " + std::to_string(i) +
                                  " is beyond the end of its file: was the file changed?");
    }
  }
}

Item ShardSource::read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const {
  check_index(index);
  check_bytes(sizes_[index], max_bytes);
  Item item;
  item.size = static_cast<size_t>(sizes_[index]);
  uint8_t* bytes = buffer.take(item.size);
  files_[shard_[index]]->read(offsets_[index], item.size, bytes);
  item.data = bytes;
  return item;
}

Item FileSource::read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const {
  check_index(index);
  const File file(paths_[index]);
  check_bytes(file.size(), max_bytes);
  Item item;
  item.size = static_cast<size_t>(file.size());
  uint8_t* bytes = buffer.take(item.size);
  file.read(0, item.size, bytes);
  item.data = bytes;
  return item;
}

void ArrayShape::check() const {
  if (channels != 1 && channels != 3) {
    throw std::invalid_argument("an array of " + std::to_string(channels) +
                                " channels: images are uint8 [N, H, W, 3] or [N, H, W, 1]");
  }
  if (count < 0 || height < 1 || width < 1) {
    throw std::invalid_argument("the images have no pixels");
  }
  constexpr int64_t kMost = int64_t{1} << 62;
  if (height > kMost / channels / width || (count > 0 && image_bytes() > kMost / count)) {
    throw std::invalid_argument("the images have too many pixels");
  }
}

ArraySource::ArraySource(const uint8_t* data, ArrayShape shape, std::shared_ptr<const void> owner)
    : data_(data), shape_(shape), owner_(std::move(owner)) {
  shape_.check();
}

Item ArraySource::read(int64_t index, ByteBuffer&, int64_t) const {
  check_index(index);
  Item item;
  item.data = data_ + index * shape_.image_bytes();
  item.height = shape_.height;
  item.width = shape_.width;
  item.channels = shape_.channels;
  return item;
}

ArrayFileSource::ArrayFileSource(std::string path, int64_t offset, ArrayShape shape)
    : file_(std::move(path)), offset_(offset), shape_(shape) {
  shape_.check();
  const int64_t needed = shape_.count * shape_.image_bytes();
  if (offset < 0 || offset > file_.size() || needed > file_.size() - offset) {
    throw std::invalid_argument(std::to_string(needed) + " bytes of images from byte " +
                                std::to_string(offset) + " on in a file of " +
                                std::to_string(file_.size()) + " bytes: is it truncated?");
  }
}

Item ArrayFileSource::read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const {
  check_index(index);
  const int64_t size = shape_.image_bytes();
  check_bytes(size, max_bytes);
  uint8_t* bytes = buffer.take(static_cast<size_t>(size));
  file_.read(offset_ + index * size, static_cast<size_t>(size), bytes);
  Item item;
  item.data = bytes;
  item.height = shape_.height;
  item.width = shape_.width;
  item.channels = shape_.channels;
  return item;
}

FunctionSource::FunctionSource(Read read, int64_t count) : read_(std::move(read)), count_(count) {
  if (count < 1) throw std::invalid_argument("a source needs at least one image");
}

Item FunctionSource::read(int64_t index, ByteBuffer& buffer, int64_t max_bytes) const {
  check_index(index);
  return read_(index, buffer, max_bytes);
}

}  // namespace bagssl
