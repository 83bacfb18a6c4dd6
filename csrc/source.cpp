#include "source.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace bagssl {
namespace {

/// A file descriptor that closes itself.
class OpenFile {
 public:
  explicit OpenFile(const std::string& path) : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0) fail("cannot open the file");
  }
  ~OpenFile() {
    if (fd_ >= 0) close(fd_);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  int fd() const { return fd_; }

  /// The size of a regular file; anything else (a folder, a pipe) is refused.
  size_t size() const {
    struct stat info;
    if (fstat(fd_, &info) != 0) fail("cannot stat the file");
    if (!S_ISREG(info.st_mode)) throw std::runtime_error("not a regular file");
    return static_cast<size_t>(info.st_size);
  }

  [[noreturn]] static void fail(const std::string& what) {
    throw std::runtime_error(what + ": " + std::strerror(errno));
  }

 private:
  int fd_;
};

}  // namespace

void Source::check_index(int64_t index) const {
  if (index < 0 || index >= size()) {
    throw std::invalid_argument("image " + std::to_string(index) + " of a source of " +
                                std::to_string(size()) + " images");
  }
}

MappedFile::MappedFile(const std::string& path) {
  OpenFile file(path);
  size_ = file.size();
  if (size_ == 0) return;
  void* mapped = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file.fd(), 0);
  if (mapped == MAP_FAILED) OpenFile::fail("cannot map the file");
  data_ = static_cast<const uint8_t*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

ShardSource::ShardSource(const std::vector<std::string>& paths, std::vector<int32_t> shard,
                         std::vector<int64_t> offsets, std::vector<int64_t> sizes)
    : shard_(std::move(shard)), offsets_(std::move(offsets)), sizes_(std::move(sizes)) {
  if (shard_.size() != offsets_.size() || sizes_.size() != offsets_.size()) {
    throw std::invalid_argument("shard, offsets and sizes differ in length");
  }
  for (const std::string& path : paths) files_.push_back(std::make_unique<MappedFile>(path));
  for (size_t i = 0; i < offsets_.size(); ++i) {
    if (shard_[i] < 0 || shard_[i] >= static_cast<int32_t>(files_.size())) {
      throw std::invalid_argument("image " + std::to_string(i) + " names shard " +
                                  std::to_string(shard_[i]) + " of " +
                                  std::to_string(files_.size()));
    }
    const int64_t end = static_cast<int64_t>(files_[shard_[i]]->size());
    if (offsets_[i] < 0 || sizes_[i] < 0 || offsets_[i] > end || sizes_[i] > end - offsets_[i]) {
      throw std::invalid_argument("image " + std::to_string(i) +
                                  " is beyond the end of its file: was the file changed?");
    }
  }
}

Item ShardSource::read(int64_t index, std::vector<uint8_t>&) const {
  check_index(index);
  Item item;
  item.data = files_[shard_[index]]->data() + offsets_[index];
  item.size = static_cast<size_t>(sizes_[index]);
  return item;
}

Item FileSource::read(int64_t index, std::vector<uint8_t>& buffer) const {
  check_index(index);
  OpenFile file(paths_[index]);
  buffer.resize(file.size());
  size_t done = 0;
  while (done < buffer.size()) {
    const ssize_t got = ::read(file.fd(), buffer.data() + done, buffer.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) OpenFile::fail("cannot read the file");
    if (got == 0) break;  // it shrank meanwhile; the decoder will say that it is truncated
    done += static_cast<size_t>(got);
  }
  Item item;
  item.data = buffer.data();
  item.size = done;
  return item;
}

ArraySource::ArraySource(const uint8_t* data, int64_t count, int64_t height, int64_t width,
                         int64_t channels, std::shared_ptr<const void> owner)
    : data_(data),
      count_(count),
      height_(height),
      width_(width),
      channels_(channels),
      owner_(std::move(owner)) {
  if (channels != 1 && channels != 3) {
    throw std::invalid_argument("an array of " + std::to_string(channels) +
                                " channels: images are uint8 [N, H, W, 3] or [N, H, W, 1]");
  }
  if (height < 1 || width < 1) throw std::invalid_argument("the images have no pixels");
}

Item ArraySource::read(int64_t index, std::vector<uint8_t>&) const {
  check_index(index);
  Item item;
  item.data = data_ + index * height_ * width_ * channels_;
  item.height = height_;
  item.width = width_;
  item.channels = channels_;
  return item;
}

FunctionSource::FunctionSource(Read read, int64_t count) : read_(std::move(read)), count_(count) {
  if (count < 1) throw std::invalid_argument("a source needs at least one image");
}

Item FunctionSource::read(int64_t index, std::vector<uint8_t>& buffer) const {
  check_index(index);
  return read_(index, buffer);
}

}  // namespace bagssl
