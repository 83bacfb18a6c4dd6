#pragma once

#include <cstddef>
#include <cstdint>
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

/// Scans the headers of an archive in memory: ustar with prefixes, GNU long names, PAX paths and
/// sizes, hard links. Folders, symbolic links and devices are passed over. What is damaged does not
/// throw: the members before it are returned and `damage` says what was met, and where.
TarIndex index_tar(const uint8_t* data, size_t size);

}  // namespace bagssl
