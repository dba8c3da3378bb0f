// Opens a checkpoint as one side of a conversion and holds it against its layouts.
#include "files/side.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "files/folder.h"
#include "files/stored_file.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// Other names that files of a framework may have: options that a spec can end with.
constexpr std::array<std::string_view, 4> kOtherNames = {
    "norms=separate", "experts=sequential", "norms=separate,experts=sequential", "experts=stacked"};

struct Stored {
  const StoredTensor* tensor = nullptr;
  const OpenFile* file = nullptr;
};
using StoredByName = std::map<std::string_view, Stored>;

StoredByName by_name(std::span<const OpenFile> files) {
  StoredByName found;
  for (const OpenFile& file : files) {
    for (const StoredTensor& tensor : file.tensors())
      found.emplace(tensor.name, Stored{&tensor, &file});
  }
  return found;
}

Unexpected mismatch(std::string_view where, const std::string& problem) {
  return {Error{ErrorCode::kLayoutMismatch, fmt::format("{}: {}", where, problem)}};
}

std::string files_text(std::span<const OpenFile> files) {
  return files.size() == 1 ? files[0].path()
                           : std::filesystem::path(files[0].path()).parent_path().string();
}

// Expected [6, 4] holds [2, 3, 4] too: leading dimensions may be folded, rows are rows.
bool same_rows(const Dims& expected, const Dims& found) {
  if (expected == found) return true;
  if (expected.product() == 0 && found.product() == 0) return true;
  const bool other_rank =
      expected.rank() != found.rank() && expected.rank() >= 2 && found.rank() >= 2;
  return other_rank && expected.product() == found.product() &&
         expected[expected.rank() - 1] == found[found.rank() - 1];
}

Result<void> check_stored(const ParameterSpec& expected, const Dims& shape, const Stored& stored) {
  if (stored.tensor->dtype != expected.dtype) {
    const std::string hint = stored.tensor->dtype ? fmt::format(" (dtype={} in the spec reads it)",
                                                                dtype_name(*stored.tensor->dtype))
                                                  : "";
    return mismatch(stored.file->path(),
                    fmt::format("tensor {}: expected dtype {}, found {}{}", expected.name,
                                dtype_name(expected.dtype), stored.tensor->dtype_text, hint));
  }
  if (!same_rows(shape, stored.tensor->shape)) {
    return mismatch(stored.file->path(),
                    fmt::format("tensor {}: expected shape {}, found {}", expected.name,
                                shape.to_string(), stored.tensor->shape.to_string()));
  }
  return {};
}

bool same_names(const Layout& layout, const StoredByName& stored) {
  return layout.parameters().size() == stored.size() &&
         std::ranges::all_of(layout.parameters(),
                             [&](const ParameterSpec& p) { return stored.contains(p.name); });
}

std::string with_options(std::string_view text, std::string_view options) {
  return fmt::format("{}{}{}", text, text.find(':') == std::string_view::npos ? ':' : ',', options);
}

// Experts as vLLM named them before 0.33, and SGLang does, where `stored` has such names.
Result<Layout> with_older_names(const Layout& layout, const StoredByName& stored) {
  constexpr std::string_view kNewer = ".routed_experts.";
  const auto older_name = [&](const std::string& name) {
    const size_t at = name.find(kNewer);
    if (at == std::string::npos) return name;
    const std::string older = fmt::format("{}.{}", std::string_view(name).substr(0, at),
                                          std::string_view(name).substr(at + kNewer.size()));
    return stored.contains(older) ? older : name;
  };
  LayoutBuilder builder;
  std::vector<uint32_t> parameters;
  for (const ParameterSpec& parameter : layout.parameters()) {
    parameters.push_back(builder.parameter({.name = older_name(parameter.name),
                                            .dtype = parameter.dtype,
                                            .element_count = parameter.element_count}));
  }
  for (const Tile& tile : layout.tiles()) {
    builder.tile(builder.tensor(layout.tensors()[tile.tensor]), tile.box,
                 parameters[tile.parameter], tile.element_offset, tile.element_strides);
  }
  for (const Fill& fill : layout.fills()) {
    builder.fill(parameters[fill.parameter], fill.element_offset, fill.length,
                 fill.element_strides);
  }
  return builder.build();
}

// The layout of the spec whose names the file has; the plain one where none fits.
Result<Layout> layout_as_named(const KnownModel& model, std::string_view text, int64_t rank,
                               std::span<const OpenFile> files) {
  TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, model.layout(text, rank));
  const StoredByName stored = by_name(files);
  if (same_names(layout, stored)) return layout;
  for (const std::string_view options : kOtherNames) {
    const auto other = model.layout(with_options(text, options), rank);
    if (!other) continue;  // this framework has no such names, or they are chosen already
    if (same_names(*other, stored)) return *other;
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout older, with_older_names(layout, stored));
  return with_stacked_experts(older, files);
}

struct StackPlace {
  std::string parameter;
  int64_t expert = 0;
  int64_t half = 0;  // 1: up, after gate
  int64_t halves = 1;
};

// Where "…experts.3.up_proj.weight" lies in a stack.
std::optional<StackPlace> stack_place(std::string_view name) {
  constexpr std::string_view kExperts = ".experts.";
  const size_t at = name.find(kExperts);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string stem(name.substr(0, at + kExperts.size()));
  const std::string_view rest = name.substr(stem.size());
  const size_t dot = rest.find('.');
  if (dot == std::string_view::npos || dot == 0 || dot > 6 ||
      rest.substr(0, dot).find_first_not_of("0123456789") != std::string_view::npos) {
    return std::nullopt;
  }
  const int64_t expert = std::stoll(std::string(rest.substr(0, dot)));
  const std::string_view matrix = rest.substr(dot + 1);
  if (matrix == "gate_proj.weight") return StackPlace{stem + "gate_up_proj", expert, 0, 2};
  if (matrix == "up_proj.weight") return StackPlace{stem + "gate_up_proj", expert, 1, 2};
  if (matrix == "down_proj.weight") return StackPlace{stem + "down_proj", expert, 0, 1};
  return std::nullopt;
}

}  // namespace

Result<void> ReadableSide::check_unchanged() const {
  for (const OpenFile& file : files) TRANSFUSE_RETURN_IF_ERROR(file.check_unchanged());
  return {};
}

Result<Layout> with_stacked_experts(const Layout& layout, std::span<const OpenFile> stored) {
  const StoredByName names = by_name(stored);
  std::map<std::string, int64_t> counts;  // experts of a stack
  for (const ParameterSpec& parameter : layout.parameters()) {
    const auto place = stack_place(parameter.name);
    if (!place || !names.contains(place->parameter)) continue;
    auto& count = counts[place->parameter];
    count = std::max(count, place->expert + 1);
  }
  if (counts.empty()) return layout;
  LayoutBuilder builder;
  for (const Tile& tile : layout.tiles()) {
    const ParameterSpec& parameter = layout.parameters()[tile.parameter];
    const uint32_t tensor = builder.tensor(layout.tensors()[tile.tensor]);
    const auto place = stack_place(parameter.name);
    if (!place || !counts.contains(place->parameter)) {
      builder.tile(tensor, tile.box, builder.parameter(parameter), tile.element_offset,
                   tile.element_strides);
      continue;
    }
    const int64_t matrix = parameter.element_count;
    const uint32_t stack =
        builder.parameter({.name = place->parameter,
                           .dtype = parameter.dtype,
                           .element_count = counts[place->parameter] * place->halves * matrix});
    builder.tile(tensor, tile.box, stack,
                 tile.element_offset + (place->expert * place->halves + place->half) * matrix,
                 tile.element_strides);
  }
  return builder.build();
}

Result<uint64_t> ReadableSide::recorded_version() const {
  for (const OpenFile& file : files) {
    if (file.recorded_version() == files[0].recorded_version()) continue;
    return Error{ErrorCode::kCorrupt,
                 fmt::format("{} records version {}, {} version {} (0: none)", files[0].path(),
                             files[0].recorded_version(), file.path(), file.recorded_version())};
  }
  return files.empty() ? 0 : files[0].recorded_version();
}

Result<ReadableRank> match_rank(const Layout& layout, std::span<const OpenFile> files,
                                uint32_t first_file) {
  const StoredByName stored = by_name(files);
  const std::string where = files_text(files);
  ReadableRank rank{.layout = layout, .places = {}};
  const std::vector<Dims> shapes = parameter_shapes(layout);
  for (size_t i = 0; i < shapes.size(); ++i) {
    const ParameterSpec& parameter = layout.parameters()[i];
    const auto at = stored.find(parameter.name);
    if (at == stored.end()) {
      return mismatch(where, fmt::format("tensor {} is missing: expected {} {}; of {} tensors "
                                         "expected, {} found",
                                         parameter.name, dtype_name(parameter.dtype),
                                         shapes[i].to_string(), shapes.size(), stored.size()));
    }
    TRANSFUSE_RETURN_IF_ERROR(check_stored(parameter, shapes[i], at->second));
    rank.places.push_back(
        {.file = first_file + static_cast<uint32_t>(at->second.file - files.data()),
         .offset_bytes = at->second.tensor->offset_bytes});
  }
  if (stored.size() == shapes.size()) return rank;
  for (const auto& [name, found] : stored) {
    if (layout.find_parameter(name)) continue;
    return mismatch(found.file->path(),
                    fmt::format("tensor {} is not expected: expected {} tensors, found {}", name,
                                shapes.size(), stored.size()));
  }
  return rank;
}

Result<ReadableSide> open_side(const KnownModel& model, std::string_view text,
                               const std::string& path) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec, model.parse(text));
  ReadableSide side;
  const auto add_rank = [&](int64_t rank, std::vector<OpenFile> files) -> Result<void> {
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, layout_as_named(model, text, rank, files));
    TRANSFUSE_ASSIGN_OR_RETURN(ReadableRank matched,
                               match_rank(layout, files, static_cast<uint32_t>(side.files.size())));
    side.ranks.push_back(std::move(matched));
    side.size_bytes += layout.parameter_bytes();
    for (OpenFile& file : files) side.files.push_back(std::move(file));
    return {};
  };
  if (spec.family == "hf") {
    TRANSFUSE_ASSIGN_OR_RETURN(std::vector<OpenFile> files, open_model_files(path));
    TRANSFUSE_RETURN_IF_ERROR(add_rank(0, std::move(files)));
    return side;
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const FolderKind kind, folder_kind(path));
  TRANSFUSE_ASSIGN_OR_RETURN(const int64_t count, rank_file_count(path));
  if (kind != FolderKind::kRanks || count != spec.rank_count()) {
    return Error{ErrorCode::kLayoutMismatch,
                 fmt::format("{}: expected files of {} ranks as \"{}\" says, found {}", path,
                             spec.rank_count(), text, count)};
  }
  for (int64_t rank = 0; rank < count; ++rank) {
    const std::string name = (std::filesystem::path(path) / rank_file_name(rank)).string();
    TRANSFUSE_ASSIGN_OR_RETURN(OpenFile file, OpenFile::open(name));
    std::vector<OpenFile> files;
    files.push_back(std::move(file));
    TRANSFUSE_RETURN_IF_ERROR(add_rank(rank, std::move(files)));
  }
  return side;
}

}  // namespace transfuse
