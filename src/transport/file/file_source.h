// A file that worker threads read from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "base/file_identity.h"
#include "base/unique_fd.h"
#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse::file {

// Reads by offset. Safe to call from any thread.
class FileSource final : public ReadSource {
 public:
  FileSource(UniqueFd fd, std::string path, uint64_t size_bytes)
      : fd_(std::move(fd)), path_(std::move(path)), size_bytes_(size_bytes) {}

  // kTornRead unless it is the very file, unchanged.
  static Result<std::unique_ptr<FileSource>> open(const IdentifiedFile& file);
  // Whatever has the name now. kNotFound.
  static Result<std::unique_ptr<FileSource>> open(const std::string& path);

  uint64_t size_bytes() const override { return size_bytes_; }
  Result<void> read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                    std::span<std::byte> scratch) const override;

 private:
  const UniqueFd fd_;
  const std::string path_;
  const uint64_t size_bytes_;
};

}  // namespace transfuse::file
