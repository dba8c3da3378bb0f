// Strided copies out of a file: by pread, through a buffer of fixed size. Unlike a mapping, a file
// that is cut meanwhile is an error and no signal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "transfuse/copy.h"
#include "transfuse/result.h"

namespace transfuse {

// What a thread's scratch should hold: system calls do not count, and it stays in a core's
// second-level cache.
inline constexpr uint64_t kFileScratchBytes = uint64_t{512} << 10;

// An open file, of somebody else.
struct FileSpan {
  int fd = -1;
  uint64_t offset_bytes = 0;  // that copies count from
  std::string_view path;      // for messages
};

// All of `to`, from `offset_bytes` after file.offset_bytes. kTornRead: the file ends before.
Result<void> read_file(const FileSpan& file, uint64_t offset_bytes, std::span<std::byte> to);

// As run_copy(), with source_offset_bytes from the start of the span; `scratch` has at least 16
// bytes. Adds the fingerprint to *sum where `sum` is not null. Call copy_fence() after the last
// one. Allocates nothing on success. Safe to call from any thread. `scales`: that the offset of the
// scales counts from; null: `file`.
Result<void> run_file_copy(const FileSpan& file, const StridedCopy& copy,
                           std::span<std::byte> scratch, uint64_t* sum,
                           const FileSpan* scales = nullptr);
// As sum_copy(): adds to `sum`, writes nothing.
Result<void> sum_file_copy(const FileSpan& file, const StridedCopy& copy,
                           std::span<std::byte> scratch, uint64_t& sum,
                           const FileSpan* scales = nullptr);

}  // namespace transfuse
