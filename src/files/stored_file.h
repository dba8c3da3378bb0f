// One safetensors file, open for reading and mapped.
#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/checkpoint.h"
#include "transfuse/result.h"

namespace transfuse {

// The Error for a failed system call: kNotFound, kPermissionDenied, kResourceExhausted (full disk,
// quota) or kUnavailable, by `number` (an errno).
Error file_error(std::string_view doing, std::string_view path, int number);

// A file whose header is checked. Reading the mapping of a file that somebody shortens meanwhile
// ends the process, as it does for every program that maps files; the header's claims cannot.
// Move-only; reading is safe from any thread.
class OpenFile {
 public:
  static Result<OpenFile> open(const std::string& path);
  OpenFile(OpenFile&& other) noexcept;
  OpenFile& operator=(OpenFile&& other) noexcept;
  ~OpenFile();

  const std::string& path() const { return path_; }
  int fd() const { return fd_.get(); }
  const std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }
  std::vector<StoredTensor>& tensors() { return tensors_; }  // by name
  const std::vector<StoredTensor>& tensors() const { return tensors_; }
  // kTornRead if the file was written since it was opened.
  Result<void> check_unchanged() const;

 private:
  OpenFile() = default;
  Result<void> map();

  std::string path_;
  UniqueFd fd_;
  const std::byte* data_ = nullptr;
  uint64_t size_bytes_ = 0;
  struct timespec modified_ = {};
  std::vector<StoredTensor> tensors_;
};

}  // namespace transfuse
