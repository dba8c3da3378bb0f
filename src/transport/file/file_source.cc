// Opens files as regions.
#include "transport/file/file_source.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/file_identity.h"
#include "base/unique_fd.h"
#include "copy/file_read.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse::file {
namespace {

Result<UniqueFd> open_file(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return file_error("cannot open", path, errno);
  return fd;
}

}  // namespace

Result<std::unique_ptr<FileSource>> FileSource::open(const IdentifiedFile& file) {
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd fd, open_file(file.path));
  TRANSFUSE_ASSIGN_OR_RETURN(const FileIdentity found, identify_file(fd.get(), file.path));
  if (found != file.identity) {
    return Error{ErrorCode::kTornRead,
                 fmt::format("{}: expected the file of {} bytes that was announced, found another, "
                             "or written since, of {} bytes",
                             file.path, file.identity.size_bytes, found.size_bytes)};
  }
  return std::make_unique<FileSource>(std::move(fd), file.path, found.size_bytes);
}

Result<std::unique_ptr<FileSource>> FileSource::open(const std::string& path) {
  TRANSFUSE_ASSIGN_OR_RETURN(UniqueFd fd, open_file(path));
  struct stat facts = {};
  if (::fstat(fd.get(), &facts) != 0) return file_error("cannot look at", path, errno);
  return std::make_unique<FileSource>(std::move(fd), path, static_cast<uint64_t>(facts.st_size));
}

Result<void> FileSource::read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                              std::span<std::byte> scratch) const {
  const FileSpan file{.fd = fd_.get(), .offset_bytes = 0, .path = path_};
  for (size_t i = 0; i < copies.size(); ++i) {
    uint64_t sum = 0;
    const bool summed = copies[i].fingerprint && !fingerprints.empty();
    TRANSFUSE_RETURN_IF_ERROR(run_file_copy(file, copies[i], scratch, summed ? &sum : nullptr));
    if (summed) fingerprints[i] = sum;
  }
  return {};
}

}  // namespace transfuse::file
