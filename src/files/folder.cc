// Looks into checkpoint folders and opens what belongs together.
#include "files/folder.h"

#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/file_identity.h"
#include "files/stored_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr std::string_view kRankPrefix = "rank";
constexpr std::string_view kSuffix = ".safetensors";

bool exists(const std::string& path) {
  struct stat facts = {};
  return ::stat(path.c_str(), &facts) == 0;
}

bool is_folder(const std::string& path) {
  struct stat facts = {};
  return ::stat(path.c_str(), &facts) == 0 && S_ISDIR(facts.st_mode);
}

std::string join(const std::string& folder, std::string_view name) {
  return (std::filesystem::path(folder) / name).string();
}

std::optional<int64_t> rank_of(std::string_view name) {
  if (!name.starts_with(kRankPrefix) || !name.ends_with(kSuffix)) return std::nullopt;
  name.remove_prefix(kRankPrefix.size());
  name.remove_suffix(std::min(name.size(), kSuffix.size()));
  int64_t rank = -1;
  const auto [stop, error] = std::from_chars(name.data(), name.data() + name.size(), rank);
  if (error != std::errc() || stop != name.data() + name.size() || rank < 0) return std::nullopt;
  return fmt::format("{}", rank) == name ? std::optional(rank) : std::nullopt;
}

Result<std::vector<int64_t>> ranks_in(const std::string& folder) {
  std::vector<int64_t> ranks;
  std::error_code error;
  std::filesystem::directory_iterator entries(folder, error);
  while (!error && entries != std::filesystem::directory_iterator()) {
    if (const auto rank = rank_of(entries->path().filename().string())) ranks.push_back(*rank);
    entries.increment(error);
  }
  if (error) return file_error("cannot list", folder, error.value());
  std::ranges::sort(ranks);
  return ranks;
}

Unexpected corrupt(const std::string& path, const std::string& problem) {
  return {Error{ErrorCode::kCorrupt, fmt::format("{}: {}", path, problem)}};
}

// Tensor to file, as the index says.
using WeightMap = std::map<std::string, std::string>;

Result<WeightMap> read_index(const std::string& path) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string text, read_text_file(path));
  const nlohmann::json index = nlohmann::json::parse(text, nullptr, false);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return corrupt(path, "expected a JSON object with an object \"weight_map\"");
  }
  WeightMap map;
  for (const auto& [tensor, file] : index["weight_map"].items()) {
    if (!file.is_string()) return corrupt(path, fmt::format("tensor {}: expected text", tensor));
    const auto& name = file.get_ref<const std::string&>();
    if (name.empty() || name.find('/') != std::string::npos || name.starts_with('.')) {
      return corrupt(path, fmt::format("tensor {}: expected a file of this folder, found \"{}\"",
                                       tensor, name));
    }
    map.emplace(tensor, name);
  }
  return map;
}

// Every shard holds exactly what the index puts there.
Result<void> check_index(const std::string& index, const WeightMap& map,
                         const std::map<std::string, OpenFile>& shards) {
  size_t found = 0;
  for (const auto& [name, shard] : shards) {
    for (const StoredTensor& tensor : shard.tensors()) {
      const auto at = map.find(tensor.name);
      if (at == map.end() || at->second != name) {
        return corrupt(shard.path(),
                       fmt::format("holds tensor {}, which {} {}", tensor.name, index,
                                   at == map.end() ? "does not name" : "puts into " + at->second));
      }
      ++found;
    }
  }
  if (found == map.size()) return {};
  for (const auto& [tensor, name] : map) {
    const auto& held = shards.at(name).tensors();
    if (!std::ranges::binary_search(held, tensor, {}, &StoredTensor::name)) {
      return corrupt(index, fmt::format("puts tensor {} into {}, which does not hold it", tensor,
                                        shards.at(name).path()));
    }
  }
  return {};
}

}  // namespace

std::string rank_file_name(int64_t rank) {
  return fmt::format("{}{}{}", kRankPrefix, rank, kSuffix);
}

Result<std::string> read_text_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return file_error("cannot open", path, errno);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return file_error("cannot read", path, errno);
  return text;
}

Result<FolderKind> folder_kind(const std::string& folder) {
  if (!is_folder(folder)) {
    return Error{ErrorCode::kNotFound, folder + ": expected a folder, found none"};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const auto ranks, ranks_in(folder));
  const bool single = exists(join(folder, kSingleName));
  const bool sharded = exists(join(folder, kIndexName));
  const int kinds = int{single} + int{sharded} + int{!ranks.empty()};
  if (kinds == 1) {
    return single ? FolderKind::kSingle : sharded ? FolderKind::kSharded : FolderKind::kRanks;
  }
  const std::string wanted = fmt::format("expected one of {}, {} and {} with its like", kSingleName,
                                         kIndexName, rank_file_name(0));
  if (kinds == 0)
    return Error{ErrorCode::kNotFound, fmt::format("{}: {}, found none", folder, wanted)};
  return Error{ErrorCode::kInvalidArgument, fmt::format("{}: {}, found {}", folder, wanted, kinds)};
}

Result<int64_t> rank_file_count(const std::string& folder) {
  TRANSFUSE_ASSIGN_OR_RETURN(const auto ranks, ranks_in(folder));
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks[i] != static_cast<int64_t>(i)) {
      return Error{ErrorCode::kNotFound,
                   fmt::format("{}: expected {} before {}, found none", folder,
                               rank_file_name(static_cast<int64_t>(i)), rank_file_name(ranks[i]))};
    }
  }
  return static_cast<int64_t>(ranks.size());
}

Result<std::vector<OpenFile>> open_model_files(const std::string& path) {
  std::vector<OpenFile> files;
  std::string single = path;
  if (is_folder(path)) {
    TRANSFUSE_ASSIGN_OR_RETURN(const FolderKind kind, folder_kind(path));
    if (kind == FolderKind::kRanks) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("{}: expected {} or {}, found files of ranks", path, kSingleName,
                               kIndexName)};
    }
    if (kind == FolderKind::kSharded) {
      const std::string index = join(path, kIndexName);
      TRANSFUSE_ASSIGN_OR_RETURN(const WeightMap map, read_index(index));
      std::map<std::string, OpenFile> shards;
      for (const auto& [tensor, name] : map) {
        if (shards.contains(name)) continue;
        const std::string shard_path = join(path, name);
        if (!exists(shard_path)) {
          return Error{ErrorCode::kNotFound,
                       fmt::format("{}: puts tensor {} into {}, which is not there", index, tensor,
                                   shard_path)};
        }
        TRANSFUSE_ASSIGN_OR_RETURN(OpenFile shard, OpenFile::open(shard_path));
        shards.emplace(name, std::move(shard));
      }
      TRANSFUSE_RETURN_IF_ERROR(check_index(index, map, shards));
      for (auto& [name, shard] : shards) files.push_back(std::move(shard));
      return files;
    }
    single = join(path, kSingleName);
  }
  TRANSFUSE_ASSIGN_OR_RETURN(OpenFile file, OpenFile::open(single));
  files.push_back(std::move(file));
  return files;
}

Result<CheckpointListing> list_checkpoint(const std::string& path) {
  std::vector<OpenFile> files;
  if (is_folder(path)) {
    TRANSFUSE_ASSIGN_OR_RETURN(const FolderKind kind, folder_kind(path));
    if (kind == FolderKind::kRanks) {
      TRANSFUSE_ASSIGN_OR_RETURN(const int64_t count, rank_file_count(path));
      for (int64_t rank = 0; rank < count; ++rank) {
        TRANSFUSE_ASSIGN_OR_RETURN(OpenFile file, OpenFile::open(join(path, rank_file_name(rank))));
        files.push_back(std::move(file));
      }
    }
  }
  if (files.empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(files, open_model_files(path));
  }
  CheckpointListing listing;
  for (OpenFile& file : files) {
    const auto number = static_cast<uint32_t>(listing.files.size());
    listing.files.push_back({.path = file.path(), .size_bytes = file.size_bytes()});
    listing.versions.push_back(file.recorded_version());
    for (StoredTensor& tensor : file.tensors()) {
      tensor.file = number;
      listing.tensors.push_back(std::move(tensor));
    }
  }
  return listing;
}

}  // namespace transfuse
