// convert_checkpoint(): check everything, move everything, sync, prove, rename.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "files/folder.h"
#include "files/folder_writer.h"
#include "files/mover.h"
#include "files/reading.h"
#include "files/safetensors.h"
#include "files/side.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr uint32_t kMostThreads = 8;                     // more only wait for the disk
constexpr uint64_t kChunkBytes = uint64_t{1} << 20;      // a buffer that stays in a core's cache
constexpr uint64_t kLongChunkBytes = uint64_t{8} << 20;  // where the kernel copies: fewer calls

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A file of the target before it exists.
struct PlannedFile {
  std::string name;
  std::vector<FileEntry> entries;
  std::string head;
  uint64_t size_bytes = 0;
};

// A rank of the target: its layout, its files and what will fill them.
struct PlannedRank {
  Layout layout;
  std::vector<PlannedFile> files;
  size_t reading = 0;  // index into Conversion::readings
};

struct Conversion {
  explicit Conversion(FoundModel model) : found(std::move(model)) {}

  FoundModel found;
  Catalog catalog;
  std::unique_ptr<ReadableSide> source;  // readings point to it
  ParallelSpec to;
  std::vector<PlannedRank> ranks;
  std::vector<Reading> readings;  // one per distinct target layout
  uint64_t version = 0;           // to be recorded; 0: none
  uint64_t target_bytes = 0;
  uint64_t planned_bytes = 0;  // that runs write
};

FileEntry entry_of(const Layout& layout, std::span<const Dims> shapes, uint32_t parameter) {
  const ParameterSpec& spec = layout.parameters()[parameter];
  return {.name = spec.name, .dtype = spec.dtype, .shape = shapes[parameter]};
}

// Parameters in the order of the catalog tensors that they begin with.
std::vector<uint32_t> in_catalog_order(const Layout& layout, const Catalog& catalog) {
  std::vector<uint32_t> order;
  std::vector<bool> listed(layout.parameters().size(), false);
  for (const TensorSpec& tensor : catalog) {
    const auto held = layout.find_tensor(tensor.name);
    if (!held) continue;
    for (const Tile& tile : layout.tiles_of(*held)) {
      if (!listed[tile.parameter]) order.push_back(tile.parameter);
      listed[tile.parameter] = true;
    }
  }
  return order;
}

// The parameters of an hf folder in the order of the catalog, cut where a file is full.
std::vector<PlannedFile> plan_shards(const Layout& layout, const Catalog& catalog,
                                     uint64_t shard_bytes) {
  const std::vector<Dims> shapes = parameter_shapes(layout);
  std::vector<PlannedFile> files(1);
  uint64_t held = 0;
  for (const uint32_t parameter : in_catalog_order(layout, catalog)) {
    FileEntry entry = entry_of(layout, shapes, parameter);
    if (held > 0 && held + entry.size_bytes() > shard_bytes) {
      files.emplace_back();
      held = 0;
    }
    held += entry.size_bytes();
    files.back().entries.push_back(std::move(entry));
  }
  for (size_t i = 0; i < files.size(); ++i) {
    files[i].name = files.size() == 1
                        ? std::string(kSingleName)
                        : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, files.size());
  }
  return files;
}

std::vector<PlannedFile> plan_rank_file(const Layout& layout, int64_t rank) {
  const std::vector<Dims> shapes = parameter_shapes(layout);
  PlannedFile file{.name = rank_file_name(rank), .entries = {}, .head = {}};
  for (uint32_t i = 0; i < shapes.size(); ++i) file.entries.push_back(entry_of(layout, shapes, i));
  std::vector<PlannedFile> files;
  files.push_back(std::move(file));
  return files;
}

Result<void> lay_out_files(std::vector<PlannedFile>& files, uint64_t version) {
  for (PlannedFile& file : files) {
    TRANSFUSE_ASSIGN_OR_RETURN(file.head, lay_out(file.entries, version));
    file.size_bytes = file.head.size();
    for (const FileEntry& entry : file.entries) file.size_bytes += entry.size_bytes();
  }
  return {};
}

// Reads headers and plans; writes nothing.
Result<Conversion> plan_conversion(const ConvertRequest& request) {
  TRANSFUSE_ASSIGN_OR_RETURN(FoundModel found,
                             find_model(request.config_json, request.from, request.source));
  Conversion all(std::move(found));
  const KnownModel& model = all.found.model;
  TRANSFUSE_ASSIGN_OR_RETURN(all.catalog, model.catalog());
  TRANSFUSE_ASSIGN_OR_RETURN(all.to, model.parse(request.to));
  TRANSFUSE_ASSIGN_OR_RETURN(const std::vector<Layout> layouts, model.layouts(request.to));
  TRANSFUSE_ASSIGN_OR_RETURN(ReadableSide source, open_side(model, request.from, request.source));
  all.source = std::make_unique<ReadableSide>(std::move(source));
  TRANSFUSE_ASSIGN_OR_RETURN(all.version, all.source->recorded_version());
  if (request.version > 0) all.version = request.version;
  const bool whole_files = all.source->ranks.size() == 1 && layouts.size() == 1;
  std::map<Digest, size_t> known;
  for (size_t rank = 0; rank < layouts.size(); ++rank) {
    const Layout& layout = layouts[rank];
    const auto [at, added] = known.emplace(layout.digest(), all.readings.size());
    if (added) {
      TRANSFUSE_ASSIGN_OR_RETURN(
          Reading reading,
          plan_reading(layout, *all.source, whole_files ? kLongChunkBytes : kChunkBytes));
      all.readings.push_back(std::move(reading));
    }
    PlannedRank planned{.layout = layout, .files = {}, .reading = at->second};
    planned.files = all.to.family == "hf" ? plan_shards(layout, all.catalog, request.shard_bytes)
                                          : plan_rank_file(layout, static_cast<int64_t>(rank));
    TRANSFUSE_RETURN_IF_ERROR(lay_out_files(planned.files, all.version));
    all.target_bytes += layout.parameter_bytes();
    all.planned_bytes += all.readings[at->second].plan().size_bytes();
    all.ranks.push_back(std::move(planned));
  }
  return all;
}

// Makes the files of one rank and fills them.
Result<void> write_rank(const Conversion& all, const PlannedRank& rank, FolderWriter& writer,
                        Mover& mover, const std::function<void(uint64_t)>& progress) {
  std::vector<TargetFile> files;
  files.reserve(rank.files.size());  // places point into it
  std::vector<WritablePlace> places(rank.layout.parameters().size());
  for (const PlannedFile& planned : rank.files) {
    TRANSFUSE_ASSIGN_OR_RETURN(TargetFile file,
                               writer.add_tensors(planned.name, planned.head, planned.size_bytes));
    files.push_back(std::move(file));
    for (const FileEntry& entry : planned.entries) {
      places[rank.layout.find_parameter(entry.name).value()] = {.file = &files.back(),
                                                                .offset_bytes = entry.offset_bytes};
    }
  }
  return mover.move(all.readings[rank.reading], places, progress);
}

// What makes a normal checkpoint folder of an hf target's tensors.
Result<void> write_hf_texts(const Conversion& all, FolderWriter& writer) {
  const std::string& config = all.found.config_json;
  if (!config.empty()) TRANSFUSE_RETURN_IF_ERROR(writer.add_text("config.json", config));
  const std::vector<PlannedFile>& files = all.ranks[0].files;
  if (files.size() == 1) return {};
  nlohmann::json index;
  index["metadata"]["total_size"] = all.target_bytes;
  for (const PlannedFile& file : files) {
    for (const FileEntry& entry : file.entries) index["weight_map"][entry.name] = file.name;
  }
  return writer.add_text(std::string(kIndexName), index.dump(2) + "\n");
}

// Whole tensors as the target holds them, each in the dtype of its first place.
Result<Layout> probe_of(const Conversion& all) {
  std::map<std::string_view, Dtype> dtypes;
  for (const PlannedRank& rank : all.ranks) {
    for (const Tile& tile : rank.layout.tiles()) {
      dtypes.emplace(rank.layout.tensors()[tile.tensor].name,
                     rank.layout.parameters()[tile.parameter].dtype);
    }
  }
  LayoutBuilder builder;
  for (const TensorSpec& tensor : all.catalog) {
    const auto dtype = dtypes.find(tensor.name);
    if (dtype == dtypes.end()) continue;
    builder.tile(
        builder.tensor(tensor), Box::whole(tensor.shape),
        builder.parameter(
            {.name = tensor.name, .dtype = dtype->second, .element_count = tensor.shape.product()}),
        0);
  }
  return builder.build();
}

// Opens what was written as any other checkpoint and holds its sums against the source's.
Result<std::vector<TensorFingerprint>> verify(const Conversion& all, const ConvertRequest& request,
                                              const std::string& written, uint32_t threads) {
  TRANSFUSE_ASSIGN_OR_RETURN(const ReadableSide target,
                             open_side(all.found.model, request.to, written));
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout probe, probe_of(all));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto expected, whole_fingerprints(probe, *all.source, threads));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto found, whole_fingerprints(probe, target, threads));
  std::vector<TensorFingerprint> fingerprints;
  for (size_t i = 0; i < expected.size(); ++i) {
    const std::string& name = probe.parameters()[i].name;
    if (expected[i] != found[i]) {
      return Error{ErrorCode::kFingerprintMismatch,
                   fmt::format("tensor {}: expected fingerprint {:016x}, found {:016x} in {}", name,
                               expected[i], found[i], written)};
    }
    fingerprints.push_back({.tensor = name, .source = expected[i], .target = found[i]});
  }
  // Replicas too: each rank by itself.
  for (size_t rank = 0; rank < all.ranks.size(); ++rank) {
    TRANSFUSE_RETURN_IF_ERROR(
        compare_fingerprints(all.readings[all.ranks[rank].reading], target, rank, threads));
  }
  return fingerprints;
}

Result<void> check_request(const ConvertRequest& request) {
  if (request.shard_bytes == 0) {
    return Error{ErrorCode::kInvalidArgument, "shard_bytes: expected at least 1, found 0"};
  }
  if (request.target.empty()) {
    return Error{ErrorCode::kInvalidArgument, "target: expected a folder, found an empty name"};
  }
  return {};
}

}  // namespace

Result<ConvertReport> convert_checkpoint(const ConvertRequest& request) {
  TRANSFUSE_RETURN_IF_ERROR(check_request(request));
  TRANSFUSE_ASSIGN_OR_RETURN(const Conversion all, plan_conversion(request));
  TRANSFUSE_ASSIGN_OR_RETURN(FolderWriter writer,
                             FolderWriter::open(request.target, request.replace_target));
  const uint32_t threads =
      request.threads > 0 ? request.threads : std::min(kMostThreads, usable_core_count());
  ConvertReport report{.tensor_count = all.catalog.size(),
                       .source_file_count = all.source->files.size(),
                       .target_file_count = 0,
                       .source_bytes = all.source->size_bytes,
                       .target_bytes = all.target_bytes,
                       .fingerprints = {}};
  auto start = std::chrono::steady_clock::now();
  Mover mover(threads);
  const auto progress = [&](uint64_t done) {
    if (request.progress) request.progress(done, all.planned_bytes);
  };
  for (const PlannedRank& rank : all.ranks) {
    TRANSFUSE_RETURN_IF_ERROR(write_rank(all, rank, writer, mover, progress));
    report.target_file_count += rank.files.size();
  }
  if (all.to.family == "hf") TRANSFUSE_RETURN_IF_ERROR(write_hf_texts(all, writer));
  progress(all.planned_bytes);
  report.move_seconds = seconds_since(start);
  TRANSFUSE_RETURN_IF_ERROR(all.source->check_unchanged());

  start = std::chrono::steady_clock::now();
  TRANSFUSE_RETURN_IF_ERROR(writer.finish());
  report.sync_seconds = seconds_since(start);
  if (request.verify) {
    start = std::chrono::steady_clock::now();
    TRANSFUSE_ASSIGN_OR_RETURN(report.fingerprints,
                               verify(all, request, writer.temporary(), threads));
    report.verify_seconds = seconds_since(start);
  }
  TRANSFUSE_RETURN_IF_ERROR(writer.commit());
  return report;
}

}  // namespace transfuse
