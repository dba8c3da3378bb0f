// A model by its config or, where that says nothing, by what a checkpoint holds.
#include <fmt/format.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "files/folder.h"
#include "files/side.h"
#include "files/stored_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

bool names_dtype(std::string_view text) { return text.find("dtype=") != std::string_view::npos; }

Result<TensorSpec> tensor_of(const OpenFile& file, const StoredTensor& stored) {
  if (stored.dtype) return TensorSpec{stored.name, *stored.dtype, stored.shape};
  return Error{ErrorCode::kUnsupported,
               fmt::format("{}: tensor {} is of dtype {}, which layouts do not have", file.path(),
                           stored.name, stored.dtype_text)};
}

Result<Catalog> whole_tensors(const std::string& path) {
  TRANSFUSE_ASSIGN_OR_RETURN(const std::vector<OpenFile> files, open_model_files(path));
  std::map<std::string, TensorSpec> tensors;
  for (const OpenFile& file : files) {
    for (const StoredTensor& stored : file.tensors()) {
      TRANSFUSE_ASSIGN_OR_RETURN(tensors[stored.name], tensor_of(file, stored));
    }
  }
  Catalog catalog;
  for (auto& [name, tensor] : tensors) catalog.push_back(std::move(tensor));
  return catalog;
}

// The rows of `dp` ranks one after another.
Result<Catalog> joined_shards(const std::string& path, int64_t dp) {
  std::map<std::string, TensorSpec> tensors;
  for (int64_t rank = 0; rank < dp; ++rank) {
    const std::string name = (std::filesystem::path(path) / rank_file_name(rank)).string();
    TRANSFUSE_ASSIGN_OR_RETURN(const OpenFile file, OpenFile::open(name));
    for (const StoredTensor& stored : file.tensors()) {
      TRANSFUSE_ASSIGN_OR_RETURN(TensorSpec shard, tensor_of(file, stored));
      const auto [at, added] = tensors.emplace(stored.name, shard);
      if (added || shard.shape.rank() == 0) continue;
      TensorSpec& whole = at->second;
      Dims expected = whole.shape;
      if (expected.rank() > 0) expected[0] = shard.shape[0];
      if (whole.dtype != shard.dtype || !(expected == shard.shape)) {
        return Error{
            ErrorCode::kCorrupt,
            fmt::format("{}: tensor {}: expected {} and rows as in the ranks before, {}, "
                        "found {} {}",
                        file.path(), stored.name, dtype_name(whole.dtype), expected.to_string(),
                        dtype_name(shard.dtype), shard.shape.to_string())};
      }
      whole.shape[0] += shard.shape[0];
    }
  }
  Catalog catalog;
  for (auto& [name, tensor] : tensors) catalog.push_back(std::move(tensor));
  return catalog;
}

}  // namespace

Result<Catalog> read_catalog(const std::string& path, const std::string& spec) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec parsed, read_parallel_spec(spec));
  // For any other family this is the error that says what works.
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout none, make_layout(Catalog(), parsed, 0));
  if (parsed.family == "hf") return whole_tensors(path);
  return joined_shards(path, parsed.dp);
}

Result<Catalog> KnownModel::catalog() const {
  if (config_) return make_catalog(*config_);
  return catalog_;
}

Result<ParallelSpec> KnownModel::parse(std::string_view text) const {
  TRANSFUSE_ASSIGN_OR_RETURN(ParallelSpec spec, read_parallel_spec(text));
  if (config_ && !names_dtype(text)) spec.dtype = config_->dtype;
  if (spec.family == "hf" && spec.rank_count() != 1) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("spec \"{}\": a folder of files has no replicas", text)};
  }
  return spec;
}

Result<Layout> KnownModel::layout(std::string_view text, int64_t rank) const {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec, parse(text));
  if (config_) return make_layout(*config_, spec, rank);
  return make_layout(catalog_, spec, rank,
                     names_dtype(text) ? std::optional(spec.dtype) : std::nullopt);
}

Result<std::vector<Layout>> KnownModel::layouts(std::string_view text) const {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec, parse(text));
  if (config_) return make_layouts(*config_, spec);
  return make_layouts(catalog_, spec, names_dtype(text) ? std::optional(spec.dtype) : std::nullopt);
}

Result<FoundModel> find_model(const std::string& config_json, const std::string& spec,
                              const std::string& path) {
  std::string text = config_json;
  const std::filesystem::path beside = std::filesystem::path(path) / "config.json";
  std::error_code ignored;
  if (text.empty() && std::filesystem::is_regular_file(beside, ignored)) {
    TRANSFUSE_ASSIGN_OR_RETURN(text, read_text_file(beside.string()));
  }
  std::string why = fmt::format("no config.json was given, and none is in {}", path);
  if (!text.empty()) {
    auto config = parse_model_config(text);
    if (config) return FoundModel{KnownModel(*std::move(config)), std::move(text)};
    if (config.error().code != ErrorCode::kUnsupported) return config.error();
    why = config.error().message;
  }
  auto catalog = read_catalog(path, spec);
  if (catalog) return FoundModel{KnownModel(*std::move(catalog)), std::move(text)};
  if (catalog.error().code != ErrorCode::kUnsupported) return catalog.error();
  return Error{ErrorCode::kUnsupported, fmt::format("{}; {}", why, catalog.error().message)};
}

}  // namespace transfuse
