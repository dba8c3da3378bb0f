// One safetensors file, open for reading.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/file_identity.h"
#include "base/unique_fd.h"
#include "copy/file_read.h"
#include "transfuse/checkpoint.h"
#include "transfuse/result.h"

namespace transfuse {

// A file whose header is checked. Move-only; reading is safe from any thread.
class OpenFile {
 public:
  static Result<OpenFile> open(const std::string& path);

  const std::string& path() const { return file_.path; }
  int fd() const { return fd_.get(); }
  uint64_t size_bytes() const { return file_.identity.size_bytes; }
  const IdentifiedFile& identified() const { return file_; }
  // The file from `offset_bytes` on, to read from while this lives.
  FileSpan span(uint64_t offset_bytes) const {
    return {.fd = fd(), .offset_bytes = offset_bytes, .path = path()};
  }
  // Of the weights, as the file itself says; 0: it does not.
  uint64_t recorded_version() const { return recorded_version_; }
  std::vector<StoredTensor>& tensors() { return tensors_; }  // by name
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  // kTornRead if the file was written, cut, replaced or removed since it was opened.
  Result<void> check_unchanged() const { return transfuse::check_unchanged(file_); }

 private:
  OpenFile() = default;

  IdentifiedFile file_;
  UniqueFd fd_;
  std::vector<StoredTensor> tensors_;
  uint64_t recorded_version_ = 0;
};

}  // namespace transfuse
