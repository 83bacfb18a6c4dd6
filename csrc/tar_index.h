#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace bagssl {

/// The regular files of a tar archive, in the archive's order.
struct TarIndex {
  std::string names;                    // all names, one after the other (bytes, as stored)
  std::vector<int64_t> name_ends;       // name i is names[name_ends[i - 1], name_ends[i])
  std::vector<int64_t> offsets, sizes;  // of the contents, in bytes
  std::string damage;                   // empty, or why the scan stopped before the end
};

/// Copies bytes of an archive, which has them; throws if they cannot be read.
using ReadAt = std::function<void(int64_t offset, size_t size, uint8_t* out)>;

/// Scans the headers of an archive of `size` bytes: ustar with prefixes, GNU long names, PAX paths
/// and sizes, hard links. Folders, symbolic links and devices are passed over. What is damaged does
/// not throw: the members before it are returned and `damage` says what was met, and where.
///
/// A hard link to a member that is not before it is listed as a file of no bytes: to whoever reads
/// it, a bad image with a name, instead of one that is missing without a word.
TarIndex index_tar(const ReadAt& read, int64_t size);

}  // namespace bagssl
