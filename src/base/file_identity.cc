// stat(), and what of it counts.
#include "base/file_identity.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <ctime>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr auto kTick = std::chrono::milliseconds(20);  // twice that of a kernel with HZ=100
constexpr uint64_t kMaxPathBytes = 4096;

int64_t nanoseconds(const struct timespec& time) {
  return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

FileIdentity identity_of(const struct stat& facts) {
  return {.device = facts.st_dev,
          .inode = facts.st_ino,
          .size_bytes = static_cast<uint64_t>(facts.st_size),
          .modified_ns = nanoseconds(facts.st_mtim),
          .changed_ns = nanoseconds(facts.st_ctim)};
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

Result<FileIdentity> identify_file(int fd, std::string_view path) {
  while (true) {
    struct stat facts = {};
    if (::fstat(fd, &facts) != 0) return file_error("cannot look at", path, errno);
    if (!S_ISREG(facts.st_mode)) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("{}: expected a file, found something else", path)};
    }
    const FileIdentity identity = identity_of(facts);
    const auto now = std::chrono::duration_cast<std::chrono::nanoseconds>(
        std::chrono::system_clock::now().time_since_epoch());
    const std::chrono::nanoseconds age = now - std::chrono::nanoseconds(identity.changed_ns);
    if (age < std::chrono::nanoseconds(0) || age >= kTick) return identity;
    std::this_thread::sleep_for(kTick - age);
  }
}

Result<FileIdentity> identify_path(const std::string& path) {
  struct stat facts = {};
  if (::stat(path.c_str(), &facts) != 0) return file_error("cannot look at", path, errno);
  return identity_of(facts);
}

Result<void> check_unchanged(const IdentifiedFile& file) {
  const auto now = identify_path(file.path);
  if (now && *now == file.identity) return {};
  if (!now && now.error().code != ErrorCode::kNotFound) return now.error();
  const FileIdentity& before = file.identity;
  const char* const what = !now ? "was removed"
                           : now->inode != before.inode || now->device != before.device
                               ? "was replaced"
                           : now->size_bytes < before.size_bytes ? "was cut"
                                                                 : "was written";
  return Error{ErrorCode::kTornRead, fmt::format("{}: {} while it was read", file.path, what)};
}

std::string file_endpoint(std::span<const IdentifiedFile> files) {
  ByteWriter out;
  out.varint(files.size());
  for (const IdentifiedFile& file : files) {
    out.text(file.path);
    out.varint(file.identity.device);
    out.varint(file.identity.inode);
    out.varint(file.identity.size_bytes);
    out.fixed(static_cast<uint64_t>(file.identity.modified_ns));
    out.fixed(static_cast<uint64_t>(file.identity.changed_ns));
  }
  return std::string(kFileEndpointPrefix) + std::move(out).take();
}

Result<std::vector<IdentifiedFile>> parse_file_endpoint(std::string_view text) {
  const bool known = text.starts_with(kFileEndpointPrefix);
  ByteReader in(known ? text.substr(kFileEndpointPrefix.size()) : std::string_view());
  std::vector<IdentifiedFile> files(in.count(20));
  for (IdentifiedFile& file : files) {
    file.path = in.text(kMaxPathBytes);
    file.identity.device = in.varint();
    file.identity.inode = in.varint();
    file.identity.size_bytes = in.varint();
    file.identity.modified_ns = static_cast<int64_t>(in.fixed<uint64_t>());
    file.identity.changed_ns = static_cast<int64_t>(in.fixed<uint64_t>());
  }
  if (!in.ok() || in.remaining() != 0 || files.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("expected an endpoint of files, found {} bytes of something else",
                             text.size())};
  }
  return files;
}

}  // namespace transfuse
