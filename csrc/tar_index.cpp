#include "tar_index.h"

#include <algorithm>
#include <cstring>
#include <string_view>

namespace bagssl {
namespace {

constexpr size_t kBlock = 512;

// Byte ranges of the header's fields (POSIX.1-1988 ustar).
constexpr size_t kName = 0, kNameSize = 100;
constexpr size_t kSize = 124, kSizeSize = 12;
constexpr size_t kChecksum = 148, kChecksumSize = 8;
constexpr size_t kType = 156;
constexpr size_t kLink = 157;
constexpr size_t kMagic = 257;
constexpr size_t kPrefix = 345, kPrefixSize = 155;

std::string_view text_field(const uint8_t* field, size_t size) {
  const char* text = reinterpret_cast<const char*>(field);
  return {text, strnlen(text, size)};
}

/// An octal number, or a big-endian binary one where the first bit is set (GNU); -1 if neither.
int64_t number_field(const uint8_t* field, size_t size) {
  if (field[0] & 0x80) {
    if (field[0] != 0x80) return -1;
    uint64_t value = 0;
    for (size_t i = 1; i < size; ++i) {
      if (value >> 54) return -1;
      value = value << 8 | field[i];
    }
    return static_cast<int64_t>(value);
  }
  size_t i = 0;
  while (i < size && field[i] == ' ') ++i;
  int64_t value = 0;
  for (; i < size && field[i] != 0 && field[i] != ' '; ++i) {
    if (field[i] < '0' || field[i] > '7') return -1;
    value = value * 8 + (field[i] - '0');
  }
  return value;
}

bool checksum_is_right(const uint8_t* header) {
  int64_t sum = 0;
  for (size_t i = 0; i < kBlock; ++i) sum += header[i];
  for (size_t i = 0; i < kChecksumSize; ++i) sum += ' ' - header[kChecksum + i];
  return sum == number_field(header + kChecksum, kChecksumSize);
}

bool is_zero_block(const uint8_t* block) {
  return std::all_of(block, block + kBlock, [](uint8_t byte) { return byte == 0; });
}

/// What PAX records or GNU long-name members say about the member that follows.
struct Overrides {
  std::string path;
  int64_t size = -1;
};

/// Records are "LENGTH KEY=VALUE\n", LENGTH counting the whole record. False if malformed.
bool read_pax(std::string_view records, Overrides* overrides) {
  while (!records.empty() && records[0] != '\0') {
    size_t length = 0, i = 0;
    for (; i < records.size() && records[i] >= '0' && records[i] <= '9' && length < 1u << 30; ++i) {
      length = length * 10 + (records[i] - '0');
    }
    if (i == 0 || i >= records.size() || records[i] != ' ') return false;
    if (length < i + 3 || length > records.size()) return false;
    const std::string_view record = records.substr(i + 1, length - i - 2);
    const size_t equals = record.find('=');
    if (equals == std::string_view::npos) return false;
    const std::string_view key = record.substr(0, equals), value = record.substr(equals + 1);
    if (key == "path") overrides->path = value;
    if (key == "size") {
      overrides->size = 0;
      for (char digit : value) {
        if (digit < '0' || digit > '9' || overrides->size > int64_t{1} << 55) return false;
        overrides->size = overrides->size * 10 + (digit - '0');
      }
    }
    records.remove_prefix(length);
  }
  return true;
}

std::string ustar_name(const uint8_t* header) {
  std::string name(text_field(header + kName, kNameSize));
  // GNU's own magic is "ustar  "; its header has times where POSIX has the prefix.
  if (std::memcmp(header + kMagic, "ustar\0", 6) == 0) {
    const std::string_view prefix = text_field(header + kPrefix, kPrefixSize);
    if (!prefix.empty()) name = std::string(prefix) + "/" + name;
  }
  return name;
}

class Scanner {
 public:
  Scanner(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  TarIndex scan() {
    while (index_.damage.empty() && read_member()) {
    }
    return std::move(index_);
  }

 private:
  /// Reads one header and what belongs to it; false at the end of the archive.
  bool read_member() {
    if (size_ - at_ < kBlock) {
      if (at_ == 0) return damage("no tar archive: " + std::to_string(size_) + " bytes");
      // Archives without the two closing zero blocks are read by every tar.
      return size_ == at_ ? false : damage("truncated in a header");
    }
    const uint8_t* header = data_ + at_;
    if (is_zero_block(header)) return end_of_archive();
    if (!checksum_is_right(header)) {
      return damage(at_ == 0 ? "not a tar archive (or a compressed one: unpack it first)"
                             : "bad header (wrong checksum)");
    }
    const char type = static_cast<char>(header[kType]);
    const bool is_file = type == '0' || type == '\0' || type == '7';
    int64_t size = number_field(header + kSize, kSizeSize);
    if (is_file && overrides_.size >= 0) size = overrides_.size;
    if (type == '1' || type == '2') size = 0;  // links have no contents, whatever they claim
    const size_t begin = at_ + kBlock;
    if (size < 0) return damage("bad header (no size)");
    if (static_cast<uint64_t>(size) > size_ - begin) {
      return damage("truncated: '" + member_name(header) + "' wants " + std::to_string(size) +
                    " bytes, " + std::to_string(size_ - begin) + " are left");
    }

    const std::string_view contents(reinterpret_cast<const char*>(data_ + begin), size);
    if (type == 'x') {
      if (!read_pax(contents, &overrides_)) return damage("malformed PAX records");
    } else if (type == 'L') {
      overrides_.path = contents.substr(0, contents.find('\0'));
    } else if (type == 'S') {
      return damage("'" + member_name(header) + "' is a sparse file, which is not supported");
    } else if (type != 'g' && type != 'K') {
      if (is_file) add(member_name(header), static_cast<int64_t>(begin), size);
      if (type == '1') add_hard_link(header);
      overrides_ = Overrides();
    }
    const size_t padded = (static_cast<size_t>(size) + kBlock - 1) / kBlock * kBlock;
    at_ = begin + std::min(padded, size_ - begin);
    return true;
  }

  /// Two zero blocks close an archive; a lone one, and what follows it, is passed over.
  bool end_of_archive() {
    if (size_ - at_ < 2 * kBlock || is_zero_block(data_ + at_ + kBlock)) return false;
    at_ += kBlock;
    return true;
  }

  bool damage(const std::string& what) {
    index_.damage = what + ", at byte " + std::to_string(at_);
    return false;
  }

  std::string member_name(const uint8_t* header) const {
    return overrides_.path.empty() ? ustar_name(header) : overrides_.path;
  }

  void add(const std::string& name, int64_t offset, int64_t size) {
    if (!name.empty() && name.back() == '/') return;  // a folder of a pre-POSIX archive
    index_.names += name;
    index_.name_ends.push_back(static_cast<int64_t>(index_.names.size()));
    index_.offsets.push_back(offset);
    index_.sizes.push_back(size);
  }

  /// A hard link has the contents of an earlier member, found by its name.
  void add_hard_link(const uint8_t* header) {
    const std::string_view target = text_field(header + kLink, kNameSize);
    for (size_t i = index_.offsets.size(); i-- > 0;) {
      const int64_t begin = i == 0 ? 0 : index_.name_ends[i - 1];
      const int64_t length = index_.name_ends[i] - begin;
      if (std::string_view(index_.names).substr(begin, length) == target) {
        add(member_name(header), index_.offsets[i], index_.sizes[i]);
        return;
      }
    }
  }

  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
  Overrides overrides_;
  TarIndex index_;
};

}  // namespace

TarIndex index_tar(const uint8_t* data, size_t size) { return Scanner(data, size).scan(); }

}  // namespace bagssl
