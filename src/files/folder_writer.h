// A checkpoint folder that appears complete under its name, or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/unique_fd.h"
#include "files/safetensors.h"
#include "transfuse/result.h"

namespace transfuse {

// A file of the folder, with its full size reserved; bytes that are never written are zeros.
struct TargetFile {
  std::string path;  // inside the temporary folder
  UniqueFd fd;
  uint64_t size_bytes = 0;
  // No store into a mapping of it can meet a full disk, which would end the process.
  bool reserved = true;
};

// Writes into a hidden folder beside `target`, locked while this process lives; folders that killed
// processes left for the same target are removed first. Used from one thread; the files it gives
// out may be written from any.
class FolderWriter {
 public:
  // kAlreadyExists where `target` is there and not `replace`; with `replace`, kInvalidArgument
  // where it is no folder of checkpoint files.
  static Result<FolderWriter> open(const std::string& target, bool replace);
  FolderWriter(FolderWriter&& other) noexcept
      : target_(std::move(other.target_)),
        temporary_(std::exchange(other.temporary_, {})),
        lock_(std::move(other.lock_)),
        replace_(other.replace_),
        files_(std::move(other.files_)) {}
  FolderWriter& operator=(FolderWriter&&) = delete;
  ~FolderWriter();  // removes what was not committed

  // `head` (from lay_out()) is written by finish(): until then the file is no safetensors file. The
  // rest is the caller's.
  Result<TargetFile> add_tensors(const std::string& name, std::string head, uint64_t size_bytes);
  Result<void> add_text(const std::string& name, std::string_view text);
  const std::string& temporary() const { return temporary_; }

  // All tensors are written: writes heads and syncs every file.
  Result<void> finish();
  // After finish(): gives the folder its name and syncs that. With `replace`, what had the name is
  // removed afterwards.
  Result<void> commit();

 private:
  FolderWriter() = default;
  Result<void> take_name();

  std::string target_;
  std::string temporary_;  // empty: nothing to remove
  UniqueFd lock_;
  bool replace_ = false;
  // Path and what finish() puts at its begin.
  std::vector<std::pair<std::string, std::string>> files_;
};

// The whole of `bytes` at `offset_bytes`.
Result<void> write_at(const TargetFile& file, std::span<const std::byte> bytes,
                      uint64_t offset_bytes);

}  // namespace transfuse
