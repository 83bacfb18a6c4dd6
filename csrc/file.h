#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace bagssl {

/// A regular file that any number of threads read at any place. Files are read, never mapped: a
/// mapped one that shrinks or whose disk fails ends the process by SIGBUS.
class File {
 public:
  /// Throws std::runtime_error if it cannot be opened, or is a folder, a pipe, a socket or a device
  /// (which it never waits for).
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const { return size_; }          // when it was opened
  int64_t modified() const { return modified_; }  // in nanoseconds

  /// Throws std::runtime_error where the bytes cannot be read or the file ends before them.
  void read(int64_t offset, size_t size, uint8_t* out) const;

 private:
  int fd_;
  int64_t size_ = 0, modified_ = 0;
};

/// A file of a data set, in use for as long as the data set. It stays open, unless so many are that
/// no more than half of the descriptors of the process are left: it is then opened for each read.
class DataFile {
 public:
  explicit DataFile(std::string path);
  ~DataFile();
  DataFile(const DataFile&) = delete;
  DataFile& operator=(const DataFile&) = delete;

  int64_t size() const { return size_; }  // when it was opened

  /// As File's; also refuses a file that was replaced since.
  void read(int64_t offset, size_t size, uint8_t* out) const;

 private:
  const std::string path_;
  std::unique_ptr<const File> file_;
  int64_t size_, modified_;
};

}  // namespace bagssl
