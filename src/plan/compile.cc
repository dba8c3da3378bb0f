// compile(): compares, proves, cuts into chunks and lowers.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plan/block_grid.h"
#include "plan/bounds.h"
#include "plan/compare.h"
#include "plan/content.h"
#include "plan/cut.h"
#include "plan/intersect.h"
#include "plan/lower.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

// Boxes stay below this so that their element counts fit a Run's 32 bits; chunks of small boxes may
// be larger.
constexpr uint64_t kMaxBoxBytes = uint64_t{1} << 31;
constexpr uint64_t kScaleBytes = 4;
constexpr size_t kMaxFindings = 1000;
constexpr size_t kListedFindings = 5;

// Collects boxes into chunks of at most chunk_bytes (more only where one element is more). Used
// from one thread.
class ChunkCutter {
 public:
  ChunkCutter(const Layout& target, uint64_t chunk_bytes)
      : target_(target), parameters_(target.parameters()), chunk_bytes_(chunk_bytes) {
    uint64_t boxes = 0;
    for (const Tile& tile : target.tiles()) {
      boxes += 1 + static_cast<uint64_t>(tile.box.element_count()) *
                       dtype_size_bytes(parameters_[tile.parameter].dtype) / chunk_bytes;
    }
    // A first guess; sources that cut a target's boxes further make more.
    const size_t runs = static_cast<size_t>(std::min<uint64_t>(boxes + boxes / 4, 1 << 22));
    lowering_.reserve(runs, runs);
    chunks_.reserve(runs);
  }

  void add(const ComparedTile& compared, std::span<const Layout> sources) {
    const Tile& tile = compared.tile;
    lowering_.begin_tile(tile, compared.shape);
    if (compared.quantization != nullptr) return add_quantizing(compared);
    const int rank = compared.cells.rank();
    const uint64_t element_bytes = dtype_size_bytes(parameters_[tile.parameter].dtype);
    for_each_cut(to_bounds(tile.box), rank, element_bytes, std::min(chunk_bytes_, kMaxBoxBytes),
                 [&](const Bounds& box) {
                   take(static_cast<uint64_t>(volume(box, rank)) * element_bytes);
                   compared.cells.for_each_in(box, [&](const Cell& cell, const Bounds& piece) {
                     const auto holders = compared.cells.holders_of(cell);
                     if (compared.dequantizes) {
                       lowering_.add_dequantizing(piece, holders, sources);
                     } else {
                       lowering_.add(piece, holders);
                     }
                   });
                 });
  }

  void finish() {
    if (current_.size_bytes > 0) close();
  }
  Lowering& lowering() { return lowering_; }
  std::vector<Chunk>& chunks() { return chunks_; }

 private:
  // Cuts between blocks, never through one.
  void add_quantizing(const ComparedTile& compared) {
    const Quantization& quantization = *compared.quantization;
    const BlockGrid grid(quantization, compared.shape);
    const uint64_t block_bytes =
        static_cast<uint64_t>(quantization.block_rows * quantization.block_columns) + kScaleBytes;
    for_each_cut(grid.scales_of(to_bounds(compared.tile.box)), 2, block_bytes,
                 std::min(chunk_bytes_, kMaxBoxBytes), [&](const Bounds& blocks) {
                   const Bounds box = grid.elements_of(blocks);
                   take(static_cast<uint64_t>(volume(box, 2)) +
                        static_cast<uint64_t>(volume(blocks, 2)) * kScaleBytes);
                   compared.cells.for_each_in(box, [&](const Cell& cell, const Bounds& piece) {
                     lowering_.add_quantizing(piece, compared.cells.holders_of(cell), target_,
                                              quantization, *compared.scales);
                   });
                 });
  }
  void take(uint64_t bytes) {
    make_room(bytes);
    current_.size_bytes += bytes;
  }
  void make_room(uint64_t bytes) {
    if (current_.size_bytes > 0 &&
        bytes > chunk_bytes_ - std::min(chunk_bytes_, current_.size_bytes)) {
      close();
    }
  }
  void close() {
    const auto end = static_cast<uint32_t>(lowering_.runs().size());
    current_.run_count = end - current_.first_run;
    chunks_.push_back(current_);
    current_ = {end, 0, 0};
    lowering_.begin_chunk();
  }

  const Layout& target_;
  std::span<const ParameterSpec> parameters_;
  uint64_t chunk_bytes_;
  Lowering lowering_;
  std::vector<Chunk> chunks_;
  Chunk current_;
};

Error mismatch(const std::vector<Finding>& findings) {
  std::string message = "target and sources do not match: " + std::to_string(findings.size()) +
                        (findings.size() == kMaxFindings ? " or more" : "") +
                        (findings.size() == 1 ? " finding" : " findings");
  for (size_t i = 0; i < std::min(findings.size(), kListedFindings); ++i) {
    message += i == 0 ? ": " : "; ";
    message += "[" + std::string(finding_kind_name(findings[i].kind)) + "] " + findings[i].reason;
  }
  if (findings.size() > kListedFindings) message += "; diagnose() lists the others";
  return {ErrorCode::kLayoutMismatch, std::move(message)};
}

// Gives back what the first guess or doubling reserved beyond need.
template <typename T>
std::vector<T> fitted(std::vector<T>& values) {
  if (values.capacity() - values.size() > values.size() / 8) values.shrink_to_fit();
  return std::move(values);
}

}  // namespace

class PlanCompiler {
 public:
  static Result<Plan> compile(const Layout& target, std::span<const Layout> sources,
                              const PlanOptions& options) {
    if (options.chunk_bytes == 0) {
      return Error{ErrorCode::kInvalidArgument, "chunk_bytes: expected at least 1, found 0"};
    }
    auto content = std::make_shared<Plan::Content>();
    content->target = target;
    content->sources = distinct_sources(sources);
    content->options = options;
    std::vector<Digest> digests;
    for (const Layout& source : content->sources) digests.push_back(source.digest());
    content->key = plan_key(target.digest(), digests, options);

    ChunkCutter cutter(content->target, options.chunk_bytes);
    Comparison comparison(content->target, content->sources, kMaxFindings);
    const std::vector<Finding> findings =
        comparison.run([&](const ComparedTile& tile) { cutter.add(tile, content->sources); });
    if (!findings.empty()) return mismatch(findings);
    cutter.finish();

    Lowering& lowering = cutter.lowering();
    if (lowering.runs().size() > UINT32_MAX || lowering.holders().size() > UINT32_MAX) {
      return Error{ErrorCode::kResourceExhausted,
                   "a plan holds at most 2^32 - 1 runs and holders, this one needs " +
                       std::to_string(lowering.runs().size()) + " and " +
                       std::to_string(lowering.holders().size())};
    }
    content->chunks = fitted(cutter.chunks());
    content->runs = fitted(lowering.runs());
    content->holders = fitted(lowering.holders());
    content->patterns = fitted(lowering.patterns());
    content->block_scales = fitted(lowering.block_scales());
    for (const Chunk& chunk : content->chunks) content->size_bytes += chunk.size_bytes;
    return Plan(std::move(content));
  }
};

Result<Plan> compile(const Layout& target, std::span<const Layout> sources,
                     const PlanOptions& options) {
  return PlanCompiler::compile(target, sources, options);
}

}  // namespace transfuse
