// Opens and checks one safetensors file.
#include "files/stored_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <string>

#include "base/file_identity.h"
#include "files/safetensors.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Result<void> read_exactly(int fd, const std::string& path, void* to, uint64_t size_bytes,
                          uint64_t offset_bytes) {
  uint64_t done = 0;
  while (done < size_bytes) {
    const ssize_t got = ::pread(fd, static_cast<char*>(to) + done, size_bytes - done,
                                static_cast<off_t>(offset_bytes + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return file_error("cannot read", path, errno);
    if (got == 0) {
      return Error{ErrorCode::kCorrupt, fmt::format("{}: ends at byte {}, expected {} more", path,
                                                    offset_bytes + done, size_bytes - done)};
    }
    done += static_cast<uint64_t>(got);
  }
  return {};
}

}  // namespace

Result<OpenFile> OpenFile::open(const std::string& path) {
  OpenFile file;
  file.fd_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.fd_) return file_error("cannot open", path, errno);
  TRANSFUSE_ASSIGN_OR_RETURN(const FileIdentity identity, identify_file(file.fd(), path));
  file.file_ = {.path = path, .identity = identity};
  const uint64_t size_bytes = file.size_bytes();
  uint64_t header_bytes = 0;
  if (size_bytes < kLengthBytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: expected a safetensors file, found {} bytes", path, size_bytes)};
  }
  TRANSFUSE_RETURN_IF_ERROR(read_exactly(file.fd(), path, &header_bytes, kLengthBytes, 0));
  if (header_bytes > kMaxHeaderBytes || header_bytes > size_bytes - kLengthBytes) {
    return Error{
        ErrorCode::kCorrupt,
        fmt::format("{}: expected a header of at most {} bytes, found a length of {}: it "
                    "is truncated or no safetensors file",
                    path, std::min(kMaxHeaderBytes, size_bytes - kLengthBytes), header_bytes)};
  }
  std::string header(header_bytes, '\0');
  TRANSFUSE_RETURN_IF_ERROR(
      read_exactly(file.fd(), path, header.data(), header_bytes, kLengthBytes));
  TRANSFUSE_ASSIGN_OR_RETURN(file.tensors_,
                             parse_header(path, header, size_bytes, &file.recorded_version_));
  return file;
}

}  // namespace transfuse
