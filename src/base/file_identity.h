// Which file it is, and which writing of it: what tells that a file was replaced, written or cut.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/result.h"

namespace transfuse {

// The Error for a failed system call: kNotFound, kPermissionDenied, kAlreadyExists,
// kResourceExhausted (full disk, quota) or kUnavailable, by `number` (an errno).
Error file_error(std::string_view doing, std::string_view path, int number);

// Two equal identities, the second taken later: the file was neither written nor replaced between
// them. Writes through a mapping are the exception: the kernel notes the time of the first one
// only, until it has written the page.
struct FileIdentity {
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t size_bytes = 0;
  int64_t modified_ns = 0;
  int64_t changed_ns = 0;  // of any change, of names and modes too; nobody can set it
  bool operator==(const FileIdentity&) const = default;
};
// Of an open file. One that was changed within the last tick of the kernel's clock is waited for
// (at most 20 ms): a second write in the same tick would leave no trace. kInvalidArgument: no
// regular file.
Result<FileIdentity> identify_file(int fd, std::string_view path);
// Of what has the name now; waits for nothing.
Result<FileIdentity> identify_path(const std::string& path);

struct IdentifiedFile {
  std::string path;
  FileIdentity identity;
};
// kTornRead unless the path still names the very file, unchanged.
Result<void> check_unchanged(const IdentifiedFile& file);

// What a reader in any process of this host passes to connect() of a `file` transport: region i + 1
// is files[i].
std::string file_endpoint(std::span<const IdentifiedFile> files);
// kInvalidArgument: no such text.
Result<std::vector<IdentifiedFile>> parse_file_endpoint(std::string_view text);
inline constexpr std::string_view kFileEndpointPrefix = "files:";

}  // namespace transfuse
