// The header of a safetensors file: parsed without trust, written as the safetensors package does.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Bound of the safetensors package itself.
inline constexpr uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr uint64_t kLengthBytes = 8;  // of the header's length, before the header
// In "__metadata__": the version of the weights, in decimal digits.
inline constexpr std::string_view kVersionKey = "transfuse.version";

// `json` is the header of `path`, which has `file_bytes` in all. Tensors come by name, offsets from
// the start of the file. kCorrupt unless they cover the rest of the file, each byte once.
// `recorded_version`, where not null: the number under kVersionKey of the metadata, 0 if there is
// none; kCorrupt where it is no number.
Result<std::vector<StoredTensor>> parse_header(std::string_view path, std::string_view json,
                                               uint64_t file_bytes,
                                               uint64_t* recorded_version = nullptr);

// A file before it is written.
struct FileEntry {
  std::string name;
  Dtype dtype = Dtype::kBF16;
  Dims shape;
  uint64_t offset_bytes = 0;  // from the start of the file; set by lay_out()
  uint64_t size_bytes() const {
    return static_cast<uint64_t>(shape.product()) * dtype_size_bytes(dtype);
  }
};
// Orders entries as the safetensors package does (wide dtypes first, then by name), sets their
// offsets and returns all that comes before the first tensor. kUnsupported: beyond kMaxHeaderBytes.
// `version` is recorded where it is not 0.
Result<std::string> lay_out(std::vector<FileEntry>& entries, uint64_t version = 0);

// "BF16" for Dtype::kBF16.
std::string_view stored_dtype_name(Dtype dtype);

}  // namespace transfuse
