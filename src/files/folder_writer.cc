// Temporary folder, reserved files, sync, rename.
#include "files/folder_writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/file_identity.h"
#include "base/random.h"
#include "base/unique_fd.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

namespace fs = std::filesystem;

fs::path parent_of(const std::string& target) {
  const fs::path parent = fs::path(target).parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

// What temporary folders for `target` begin with.
std::string temporary_prefix(const std::string& target) {
  return "." + fs::path(target).filename().string() + ".partial-";
}

// Leaves folders alone that a living process has locked.
void remove_leftovers(const std::string& target) {
  const std::string prefix = temporary_prefix(target);
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator entry(parent_of(target), error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->path().filename().string().starts_with(prefix)) found.push_back(entry->path());
  }
  for (const fs::path& path : found) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
    if (!fd || ::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) continue;
    fs::remove_all(path, error);
  }
}

// A folder whose removal loses nothing but a checkpoint.
Result<void> check_replaceable(const std::string& target) {
  std::error_code error;
  for (fs::directory_iterator entry(target, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string extension = entry->path().extension().string();
    if (entry->is_regular_file(error) && (extension == ".safetensors" || extension == ".json")) {
      continue;
    }
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("{}: expected nothing but .safetensors and .json files in a folder "
                             "to replace, found {}",
                             target, entry->path().filename().string())};
  }
  if (error) return file_error("cannot replace", target, error.value());
  return {};
}

Result<void> sync_folder(const std::string& path) {
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return file_error("cannot open", path, errno);
  if (::fsync(fd.get()) != 0) return file_error("cannot sync", path, errno);
  return {};
}

}  // namespace

Result<FolderWriter> FolderWriter::open(const std::string& target, bool replace) {
  FolderWriter writer;
  writer.target_ = fs::path(target).lexically_normal().string();
  while (writer.target_.size() > 1 && writer.target_.back() == '/') writer.target_.pop_back();
  writer.replace_ = replace;
  struct stat facts = {};
  if (::lstat(writer.target_.c_str(), &facts) == 0) {
    if (!replace) {
      return Error{ErrorCode::kAlreadyExists, target + ": is there already (--force replaces it)"};
    }
    if (!S_ISDIR(facts.st_mode)) {
      return Error{ErrorCode::kInvalidArgument, target + ": expected a folder to replace"};
    }
    TRANSFUSE_RETURN_IF_ERROR(check_replaceable(writer.target_));
  }
  remove_leftovers(writer.target_);
  const std::string path =
      (parent_of(writer.target_) /
       fmt::format("{}{:016x}", temporary_prefix(writer.target_), random_identity()))
          .string();
  if (::mkdir(path.c_str(), 0777) != 0) return file_error("cannot make", path, errno);
  writer.temporary_ = path;
  writer.lock_.reset(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!writer.lock_) return file_error("cannot open", path, errno);
  if (::flock(writer.lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    return file_error("cannot lock", path, errno);
  }
  return writer;
}

FolderWriter::~FolderWriter() {
  std::error_code error;
  if (!temporary_.empty()) fs::remove_all(temporary_, error);
}

Result<TargetFile> FolderWriter::add_tensors(const std::string& name, std::string head,
                                             uint64_t size_bytes) {
  TargetFile file{
      .path = (fs::path(temporary_) / name).string(), .fd = {}, .size_bytes = size_bytes};
  file.fd.reset(::open(file.path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!file.fd) return file_error("cannot make", file.path, errno);
  files_.emplace_back(file.path, std::move(head));
  // A full disk is found here, before hours of copying.
  if (::fallocate(file.fd.get(), 0, 0, static_cast<off_t>(size_bytes)) != 0) {
    if (errno != EOPNOTSUPP) return file_error("cannot reserve room for", file.path, errno);
    if (::ftruncate(file.fd.get(), static_cast<off_t>(size_bytes)) != 0) {
      return file_error("cannot size", file.path, errno);
    }
    file.reserved = false;
  }
  return file;
}

Result<void> FolderWriter::add_text(const std::string& name, std::string_view text) {
  TargetFile file{
      .path = (fs::path(temporary_) / name).string(), .fd = {}, .size_bytes = text.size()};
  file.fd.reset(::open(file.path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (!file.fd) return file_error("cannot make", file.path, errno);
  files_.emplace_back(file.path, std::string());
  return write_at(file, std::as_bytes(std::span(text)), 0);
}

Result<void> FolderWriter::finish() {
  for (const auto& [path, head] : files_) {
    const TargetFile file{.path = path, .fd = UniqueFd(::open(path.c_str(), O_RDWR | O_CLOEXEC))};
    if (!file.fd) return file_error("cannot open", path, errno);
    TRANSFUSE_RETURN_IF_ERROR(write_at(file, std::as_bytes(std::span(head)), 0));
    if (::fsync(file.fd.get()) != 0) return file_error("cannot sync", path, errno);
  }
  return sync_folder(temporary_);
}

Result<void> FolderWriter::commit() {
  TRANSFUSE_RETURN_IF_ERROR(take_name());
  return sync_folder(parent_of(target_).string());
}

Result<void> FolderWriter::take_name() {
  if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, target_.c_str(), RENAME_NOREPLACE) == 0) {
    temporary_.clear();
    return {};
  }
  if (errno != EEXIST || !replace_) return file_error("cannot make", target_, errno);
  if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, target_.c_str(), RENAME_EXCHANGE) != 0) {
    return file_error("cannot replace", target_, errno);
  }
  return {};  // what was replaced has the temporary name now and goes with this object
}

Result<void> write_at(const TargetFile& file, std::span<const std::byte> bytes,
                      uint64_t offset_bytes) {
  while (!bytes.empty()) {
    const ssize_t put =
        ::pwrite(file.fd.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset_bytes));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return file_error("cannot write", file.path, errno);
    bytes = bytes.subspan(static_cast<size_t>(put));
    offset_bytes += static_cast<uint64_t>(put);
  }
  return {};
}

}  // namespace transfuse
