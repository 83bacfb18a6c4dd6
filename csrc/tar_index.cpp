#include "tar_index.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <unordered_map>

namespace bagssl {
namespace {

constexpr size_t kBlock = 512;
// Of the records that go before a member: names need a few hundred bytes.
constexpr int64_t kMostRecords = 1 << 20;

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
  std::string path, link;
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
    if (key == "linkpath") overrides->link = value;
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
  Scanner(const ReadAt& read, int64_t size) : read_(read), size_(size) {}

  TarIndex scan() {
    while (index_.damage.empty() && read_member()) {
    }
    return std::move(index_);
  }

 private:
  /// Reads one header and what belongs to it; false at the end of the archive.
  bool read_member() {
    if (size_ - at_ < static_cast<int64_t>(kBlock)) {
      if (at_ == 0) return damage("no tar archive: " + std::to_string(size_) + " bytes");
      // Archives without the two closing zero blocks are read by every tar.
      return size_ == at_ ? false : damage("truncated in a header");
    }
    uint8_t header[kBlock];
    read_(at_, kBlock, header);
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
    const int64_t begin = at_ + static_cast<int64_t>(kBlock);
    if (size < 0) return damage("bad header (no size)");
    if (size > size_ - begin) {
      return damage("truncated: '" + member_name(header) + "' wants " + std::to_string(size) +
                    " bytes, " + std::to_string(size_ - begin) + " are left");
    }

    if (type == 'x' || type == 'L' || type == 'K') {
      if (!read_records(type, begin, size)) return false;
    } else if (type == 'S') {
      return damage("'" + member_name(header) + "' is a sparse file, which is not supported");
    } else if (type != 'g') {
      if (is_file) add(member_name(header), begin, size);
      if (type == '1') add_hard_link(header);
      overrides_ = Overrides();
    }
    const int64_t rest = size % static_cast<int64_t>(kBlock);
    const int64_t padding = rest == 0 ? 0 : static_cast<int64_t>(kBlock) - rest;
    at_ = begin + size + std::min(padding, size_ - begin - size);
    return true;
  }

  /// Reads what is said about the next member; false where it is damaged.
  bool read_records(char type, int64_t begin, int64_t size) {
    if (size > kMostRecords) {
      return damage("a name or PAX records of " + std::to_string(size) + " bytes");
    }
    std::string contents(static_cast<size_t>(size), '\0');
    read_(begin, contents.size(), reinterpret_cast<uint8_t*>(contents.data()));
    if (type == 'x') return read_pax(contents, &overrides_) || damage("malformed PAX records");
    const std::string_view name = std::string_view(contents).substr(0, contents.find('\0'));
    (type == 'L' ? overrides_.path : overrides_.link) = name;
    return true;
  }

  /// Two zero blocks close an archive; a lone one, and what follows it, is passed over.
  bool end_of_archive() {
    constexpr auto kStep = static_cast<int64_t>(kBlock);
    uint8_t next[kBlock];
    if (size_ - at_ < 2 * kStep) return false;
    read_(at_ + kStep, kBlock, next);
    if (is_zero_block(next)) return false;
    at_ += kStep;
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
    // Most archives have no links: names are looked up from the first one on.
    for (; named_ < index_.offsets.size(); ++named_) {
      const int64_t begin = named_ == 0 ? 0 : index_.name_ends[named_ - 1];
      const int64_t length = index_.name_ends[named_] - begin;
      by_name_[index_.names.substr(begin, length)] = named_;
    }
    const std::string target = overrides_.link.empty()
                                   ? std::string(text_field(header + kLink, kNameSize))
                                   : overrides_.link;
    const auto found = by_name_.find(target);
    if (found == by_name_.end()) {
      add(member_name(header), 0, 0);
    } else {
      add(member_name(header), index_.offsets[found->second], index_.sizes[found->second]);
    }
  }

  const ReadAt& read_;
  const int64_t size_;
  int64_t at_ = 0;
  Overrides overrides_;
  std::unordered_map<std::string, size_t> by_name_;
  size_t named_ = 0;  // members in it
  TarIndex index_;
};

}  // namespace

TarIndex index_tar(const ReadAt& read, int64_t size) { return Scanner(read, size).scan(); }

}  // namespace bagssl
