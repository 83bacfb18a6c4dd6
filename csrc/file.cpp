#include "file.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace bagssl {
namespace {

std::atomic<int64_t> files_kept_open{0};

/// Half of the descriptors that the process may have.
int64_t most_kept_open() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return 0;
  const auto most = static_cast<rlim_t>(1 << 20);
  return static_cast<int64_t>(limit.rlim_cur < most ? limit.rlim_cur : most) / 2;
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

int64_t modification_time(const struct stat& info) {
#ifdef __APPLE__
  const timespec& time = info.st_mtimespec;
#else
  const timespec& time = info.st_mtim;
#endif
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

// O_NONBLOCK: opening a pipe would wait for its writer. It means nothing for regular files.
File::File(const std::string& path)
    : fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY)) {
  if (fd_ < 0) fail("cannot open the file");
  struct stat info;
  if (fstat(fd_, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd_);
    throw std::runtime_error("not a regular file");
  }
  size_ = static_cast<int64_t>(info.st_size);
  modified_ = modification_time(info);
}

File::~File() { close(fd_); }

void File::read(int64_t offset, size_t size, uint8_t* out) const {
  while (size > 0) {
    const ssize_t got = pread(fd_, out, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("cannot read the file");
    if (got == 0) {
      throw std::runtime_error("the file ends at byte " + std::to_string(offset) + ", " +
                               std::to_string(size) +
                               " bytes too early: was it changed since it was opened?");
    }
    out += got;
    offset += got;
    size -= static_cast<size_t>(got);
  }
}

DataFile::DataFile(std::string path)
    : path_(std::move(path)), file_(std::make_unique<File>(path_)) {
  size_ = file_->size();
  modified_ = file_->modified();
  if (files_kept_open.fetch_add(1) >= most_kept_open()) {
    --files_kept_open;
    file_.reset();
  }
}

DataFile::~DataFile() {
  if (file_) --files_kept_open;
}

void DataFile::read(int64_t offset, size_t size, uint8_t* out) const {
  if (file_) {
    file_->read(offset, size, out);
    return;
  }
  const File file(path_);
  if (file.size() != size_ || file.modified() != modified_) {
    throw std::runtime_error("the file was changed since it was opened");
  }
  file.read(offset, size, out);
}

}  // namespace bagssl
