// One side of a conversion: the layouts of its ranks, and where their parameters lie in files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "files/folder_writer.h"
#include "files/stored_file.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {

// A parameter in a mapped file.
struct StoredPlace {
  const std::byte* data = nullptr;
  int fd = -1;
  uint64_t offset_bytes = 0;  // of `data` in the file
};

// A rank that can be read. Its files belong to somebody else.
struct ReadableRank {
  Layout layout;
  std::vector<StoredPlace> places;  // one per parameter
};

// Ranks that are read together, with what a plan needs of them. Safe to use from any thread.
struct ReadableSide {
  std::vector<OpenFile> files;
  std::vector<ReadableRank> ranks;
  uint64_t size_bytes = 0;  // of tensors
  Result<void> check_unchanged() const;
};

// Without dtype= in `text`: the dtype of the config.
Result<ParallelSpec> parse_side(const ModelConfig& config, std::string_view text);

// Opens the checkpoint at `path` and matches it with the layouts of `text`, whichever of the names
// of that family it has. kLayoutMismatch: a tensor is missing, too many, of another dtype or shape.
Result<ReadableSide> open_side(const ModelConfig& config, std::string_view text,
                               const std::string& path);

// The same for layouts that are known, in their order; `files` are their ranks' files (of one rank:
// all that together hold it).
Result<ReadableRank> match_rank(const Layout& layout, std::span<const OpenFile> files);

// Experts stacked as transformers 5 holds them in memory, where `stored` has such names.
Result<Layout> with_stacked_experts(const Layout& layout, std::span<const OpenFile> stored);

}  // namespace transfuse
