// Files of a private folder, mapped by the one process that writes them.
#include "transport/file/served_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/file_identity.h"
#include "base/unique_fd.h"
#include "copy/file_read.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::file {
namespace {

constexpr std::string_view kTokenName = "token";

std::string token_path(std::string_view folder) { return fmt::format("{}/{}", folder, kTokenName); }

Result<void> write_token(const std::string& folder, std::string_view token) {
  const std::string path = token_path(folder);
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) return file_error("cannot make", path, errno);
  const ssize_t put = ::write(fd.get(), token.data(), token.size());
  if (put == static_cast<ssize_t>(token.size())) return {};
  return file_error("cannot write", path, put < 0 ? errno : ENOSPC);
}

}  // namespace

// Used from one thread.
class ServedFolder::Region final : public LocalRegion {
 public:
  Region(ServedFolder& folder, RegionId id, std::span<std::byte> bytes)
      : folder_(folder), id_(id), bytes_(bytes) {
    ++folder_.regions_;
    folder_.region_bytes_ += bytes_.size();
  }
  ~Region() override {
    ::munmap(bytes_.data(), bytes_.size());
    if (folder_.in_child()) return;  // the file is the parent's
    ::unlink(region_path(folder_.path_, id_).c_str());
    --folder_.regions_;
    folder_.region_bytes_ -= bytes_.size();
  }
  std::span<std::byte> bytes() const override { return bytes_; }
  RegionDescriptor descriptor() const override { return {id_, bytes_.size()}; }

 private:
  ServedFolder& folder_;
  const RegionId id_;
  const std::span<std::byte> bytes_;
};

ServedFolder::ServedFolder(std::string path) : path_(std::move(path)), pid_(::getpid()) {}

bool ServedFolder::in_child() const { return ::getpid() != pid_; }

Result<std::unique_ptr<ServedFolder>> ServedFolder::open(std::string_view parent,
                                                         std::string_view token) {
  std::string path = fmt::format("{}/regions-XXXXXX", parent);
  if (::mkdtemp(path.data()) == nullptr) return file_error("cannot make", path, errno);
  std::unique_ptr<ServedFolder> folder(new ServedFolder(path));
  if (!token.empty()) TRANSFUSE_RETURN_IF_ERROR(write_token(path, token));
  return folder;
}

ServedFolder::~ServedFolder() {
  std::error_code ignored;
  if (!in_child()) std::filesystem::remove_all(path_, ignored);
}

Result<std::unique_ptr<LocalRegion>> ServedFolder::allocate(uint64_t size_bytes) {
  if (size_bytes == 0) return Error{ErrorCode::kInvalidArgument, "allocate: 0 bytes"};
  const RegionId id{++last_id_};
  const std::string path = region_path(path_, id);
  const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd) return file_error("cannot make", path, errno);
  // Room is reserved: a full disk is found here, and not by a store into the mapping.
  if (const int error = ::posix_fallocate(fd.get(), 0, static_cast<off_t>(size_bytes));
      error != 0) {
    ::unlink(path.c_str());
    return file_error("cannot reserve room for", path, error);
  }
  void* const mapped = ::mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
  if (mapped == MAP_FAILED) {
    const int error = errno;
    ::unlink(path.c_str());
    return file_error("cannot map", path, error);
  }
  return std::unique_ptr<LocalRegion>(
      std::make_unique<Region>(*this, id, std::span(static_cast<std::byte*>(mapped), size_bytes)));
}

void ServedFolder::add_stats(TransportStats& stats) const {
  stats.regions = regions_;
  stats.region_bytes = region_bytes_;
}

std::string region_path(std::string_view folder, RegionId id) {
  return fmt::format("{}/{}", folder, static_cast<uint64_t>(id));
}

Result<void> check_folder(const std::string& path, std::string_view token) {
  if (!folder_is_there(path)) {
    return Error{ErrorCode::kUnavailable, fmt::format("connect: no transport serves {}", path)};
  }
  const std::string wanted = token_path(path);
  const UniqueFd fd(::open(wanted.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd && errno == ENOENT) return {};
  if (!fd) return file_error("cannot open", wanted, errno);
  struct stat facts = {};
  if (::fstat(fd.get(), &facts) != 0) return file_error("cannot look at", wanted, errno);
  std::vector<std::byte> bytes(static_cast<size_t>(facts.st_size));
  TRANSFUSE_RETURN_IF_ERROR(read_file({.fd = fd.get(), .path = wanted}, 0, bytes));
  if (std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()) == token) {
    return {};
  }
  return Error{ErrorCode::kPermissionDenied,
               fmt::format("connect: {} asks for another token", path)};
}

bool folder_is_there(const std::string& path) {
  struct stat facts = {};
  return ::stat(path.c_str(), &facts) == 0 && S_ISDIR(facts.st_mode);
}

}  // namespace transfuse::file
