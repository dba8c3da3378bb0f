// The files of a checkpoint folder: which there are, and that they agree with their index.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "files/stored_file.h"
#include "transfuse/result.h"

namespace transfuse {

inline constexpr std::string_view kSingleName = "model.safetensors";
inline constexpr std::string_view kIndexName = "model.safetensors.index.json";
std::string rank_file_name(int64_t rank);  // "rank0.safetensors"

enum class FolderKind : uint8_t { kSingle, kSharded, kRanks };
// kNotFound where there is no checkpoint, kInvalidArgument where there are two.
Result<FolderKind> folder_kind(const std::string& folder);
// Of rank files: kNotFound names the first that is missing from 0 to the highest.
Result<int64_t> rank_file_count(const std::string& folder);

// One model: `path` is a file, or a folder with model.safetensors or an index. Each tensor once;
// what the index says and what the shards hold agree.
Result<std::vector<OpenFile>> open_model_files(const std::string& path);

Result<std::string> read_text_file(const std::string& path);

}  // namespace transfuse
