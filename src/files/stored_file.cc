// Opens, checks and maps one safetensors file.
#include "files/stored_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

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

Error file_error(std::string_view doing, std::string_view path, int number) {
  ErrorCode code = ErrorCode::kUnavailable;
  switch (number) {
    case ENOENT:
    case ENOTDIR:
      code = ErrorCode::kNotFound;
      break;
    case EACCES:
    case EPERM:
    case EROFS:
      code = ErrorCode::kPermissionDenied;
      break;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
    case ENOMEM:
    case EMFILE:
    case ENFILE:
      code = ErrorCode::kResourceExhausted;
      break;
    case EEXIST:
    case ENOTEMPTY:
      code = ErrorCode::kAlreadyExists;
      break;
    default:
      break;
  }
  return {code, fmt::format("{} {}: {}", doing, path, std::generic_category().message(number))};
}

OpenFile::OpenFile(OpenFile&& other) noexcept
    : path_(std::move(other.path_)),
      fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      size_bytes_(other.size_bytes_),
      modified_(other.modified_),
      tensors_(std::move(other.tensors_)) {}

OpenFile& OpenFile::operator=(OpenFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(data_, other.data_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(modified_, other.modified_);
  std::swap(tensors_, other.tensors_);
  return *this;
}

OpenFile::~OpenFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_bytes_);
}

Result<OpenFile> OpenFile::open(const std::string& path) {
  OpenFile file;
  file.path_ = path;
  file.fd_.reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.fd_) return file_error("cannot open", path, errno);
  struct stat facts = {};
  if (::fstat(file.fd(), &facts) != 0) return file_error("cannot look at", path, errno);
  if (!S_ISREG(facts.st_mode)) {
    return Error{ErrorCode::kInvalidArgument, path + ": expected a file, found something else"};
  }
  file.size_bytes_ = static_cast<uint64_t>(facts.st_size);
  file.modified_ = facts.st_mtim;
  uint64_t header_bytes = 0;
  if (file.size_bytes_ < kLengthBytes) {
    return Error{ErrorCode::kCorrupt, fmt::format("{}: expected a safetensors file, found {} bytes",
                                                  path, file.size_bytes_)};
  }
  TRANSFUSE_RETURN_IF_ERROR(read_exactly(file.fd(), path, &header_bytes, kLengthBytes, 0));
  if (header_bytes > kMaxHeaderBytes || header_bytes > file.size_bytes_ - kLengthBytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{}: expected a header of at most {} bytes, found a length of {}: it "
                             "is truncated or no safetensors file",
                             path, std::min(kMaxHeaderBytes, file.size_bytes_ - kLengthBytes),
                             header_bytes)};
  }
  std::string header(header_bytes, '\0');
  TRANSFUSE_RETURN_IF_ERROR(
      read_exactly(file.fd(), path, header.data(), header_bytes, kLengthBytes));
  TRANSFUSE_ASSIGN_OR_RETURN(file.tensors_, parse_header(path, header, file.size_bytes_));
  TRANSFUSE_RETURN_IF_ERROR(file.map());
  return file;
}

Result<void> OpenFile::map() {
  void* const mapped = ::mmap(nullptr, size_bytes_, PROT_READ, MAP_SHARED, fd(), 0);
  if (mapped == MAP_FAILED) return file_error("cannot map", path_, errno);
  data_ = static_cast<const std::byte*>(mapped);
  return {};
}

Result<void> OpenFile::check_unchanged() const {
  struct stat facts = {};
  if (::fstat(fd(), &facts) != 0) return file_error("cannot look at", path_, errno);
  if (static_cast<uint64_t>(facts.st_size) != size_bytes_ ||
      facts.st_mtim.tv_sec != modified_.tv_sec || facts.st_mtim.tv_nsec != modified_.tv_nsec) {
    return Error{ErrorCode::kTornRead, path_ + ": changed while it was read"};
  }
  return {};
}

}  // namespace transfuse
