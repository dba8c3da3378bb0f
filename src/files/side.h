// One side of a conversion: the layouts of its ranks, and where their parameters lie in files.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "copy/file_read.h"
#include "files/stored_file.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {

// Where a parameter lies.
struct StoredPlace {
  uint32_t file = 0;  // index into ReadableSide::files
  uint64_t offset_bytes = 0;
};

// A rank that can be read.
struct ReadableRank {
  Layout layout;
  std::vector<StoredPlace> places;  // one per parameter
};

// Ranks that are read together, with what a plan needs of them. Safe to use from any thread.
struct ReadableSide {
  std::vector<OpenFile> files;
  std::vector<ReadableRank> ranks;
  uint64_t size_bytes = 0;  // of tensors
  FileSpan span(const StoredPlace& place) const {
    return files[place.file].span(place.offset_bytes);
  }
  // Of the weights, as the files say; 0: they do not. kCorrupt where they contradict each other.
  Result<uint64_t> recorded_version() const;
  Result<void> check_unchanged() const;
};

// What is known of a model: its config, or its tensors alone.
class KnownModel {
 public:
  KnownModel(ModelConfig config) : config_(std::move(config)) {}  // NOLINT: a config is enough
  explicit KnownModel(Catalog catalog) : catalog_(std::move(catalog)) {}

  Result<Catalog> catalog() const;
  // Without dtype= in `text`: the dtype of the config; without a config each tensor's own.
  Result<ParallelSpec> parse(std::string_view text) const;
  Result<Layout> layout(std::string_view text, int64_t rank) const;
  Result<std::vector<Layout>> layouts(std::string_view text) const;

 private:
  std::optional<ModelConfig> config_;
  Catalog catalog_;  // without a config
};
// By `config_json` or, where that is empty, config.json in the folder `path`. Where there is none,
// or it is of a kind that is not described, by the headers of `path`, which has the layout `spec`.
struct FoundModel {
  KnownModel model;
  std::string config_json;  // empty: none
};
Result<FoundModel> find_model(const std::string& config_json, const std::string& spec,
                              const std::string& path);

// Opens the checkpoint at `path` and matches it with the layouts of `text`, whichever of the names
// of that family it has. kLayoutMismatch: a tensor is missing, too many, of another dtype or shape.
Result<ReadableSide> open_side(const KnownModel& model, std::string_view text,
                               const std::string& path);

// The same for layouts that are known, in their order; `files` are their ranks' files (of one rank:
// all that together hold it), the first of which is `first_file` of its side.
Result<ReadableRank> match_rank(const Layout& layout, std::span<const OpenFile> files,
                                uint32_t first_file = 0);

// Experts stacked as transformers 5 holds them in memory, where `stored` has such names.
Result<Layout> with_stacked_experts(const Layout& layout, std::span<const OpenFile> stored);

}  // namespace transfuse
