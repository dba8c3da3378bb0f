// The plan: which bytes of which sources land where in one target, proved complete before anything
// moves.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "transfuse/layout.h"

namespace transfuse {

struct PlanOptions {
  uint64_t chunk_bytes =
      uint64_t{1}
      << 20;  // target bytes per chunk: unit of parallel work, progress, verification, resume
  bool operator==(const PlanOptions&) const = default;
};

enum class FindingKind : uint8_t {
  kGap,            // elements of a target tile that no source holds
  kUncovered,      // elements of a target parameter that no tile and no fill covers
  kOverlap,        // elements of a target parameter that two tiles or fills write
  kDtype,          // source and target dtypes have no cast
  kShape,          // the tensor has another shape at a source, not only split dimensions
  kUnknownTensor,  // no source knows the name
  kBlock,          // a block under one scale that no source holds whole, or that a tile cuts
};
std::string_view finding_kind_name(FindingKind kind);  // "gap", "uncovered", ...

// One reason why no plan exists. `box` is in catalog coordinates where `tensor` is set (bounding
// box where a source splits a dimension of the target's shape), else in elements of `parameter`.
struct Finding {
  FindingKind kind = FindingKind::kGap;
  std::string tensor;
  std::string parameter;
  Box box;
  std::string reason;  // names what was expected and what was found
};

// Everything that is wrong between `target` and `sources` (empty: compile() succeeds). At most
// `limit` findings.
std::vector<Finding> diagnose(const Layout& target, std::span<const Layout> sources,
                              size_t limit = 1000);

// Three levels of a strided run, outermost first; unused levels have count 1 and stride 0. Strides
// in elements.
struct Strides3 {
  int64_t level[3] = {0, 0, 0};
  bool operator==(const Strides3&) const = default;
};

// One strided run of one catalog tensor into one target parameter. Everything about the target
// side; where the bytes come from is one of the `holder_count` holders that begin at
// `first_holder`.
struct Run {
  int64_t target_offset = 0;  // elements from the start of the target parameter
  int64_t linear_index =
      0;  // of the first element in the row-major catalog tensor (for the fingerprint)
  uint32_t count[3] = {1, 1, 1};
  uint32_t tensor = 0;          // index into the target layout's tensors()
  uint32_t parameter = 0;       // index into the target layout's parameters()
  uint32_t target_pattern = 0;  // index into Plan::patterns(): strides in the target parameter
  uint32_t index_pattern = 0;   // index into Plan::patterns(): strides of linear_index
  uint32_t first_holder = 0;
  uint32_t holder_count = 0;
  // Not 0: the run quantises whole blocks, its middle level rows and its inner level columns; where
  // their scales are written is Plan::block_scales()[scales - 1].
  uint32_t scales = 0;
  int64_t element_count() const { return int64_t{count[0]} * count[1] * count[2]; }
};
static_assert(sizeof(Run) <= 64, "T10: at most 64 bytes a strided run");

// A distinct source layout that holds a run, and where. Sources with equal layouts (data-parallel
// replicas) share one holder.
struct Holder {
  int64_t source_offset = 0;    // elements from the start of the source parameter
  uint32_t source_layout = 0;   // index into Plan::source_layouts()
  uint32_t parameter = 0;       // index into that layout's parameters()
  uint32_t source_pattern = 0;  // index into Plan::patterns()
  // Not 0: what is read is fp8, to be dequantised; where its scales are read is
  // Plan::block_scales()[scales - 1].
  uint32_t scales = 0;
};

// Where the scales of a run's blocks lie: in the target, where they are written, or at a holder.
struct ScaleRun {
  int64_t offset = 0;          // elements from the start of the parameter, of the first block's
  int64_t linear_index = 0;    // of it in the catalog tensor of the scales
  int64_t stride[2] = {0, 0};  // elements in the parameter, from block to block
  int64_t index_stride[2] = {0, 0};  // likewise in the catalog tensor
  uint32_t tensor = 0;         // index into the tensors() of the target or of the holder's layout
  uint32_t parameter = 0;      // index into its parameters()
  uint32_t block[2] = {1, 1};  // rows and columns of a block
  uint32_t phase[2] = {0, 0};  // where in its block the run's first element lies
  // Blocks that a run of so many elements along an axis touches.
  uint64_t block_count(int axis, uint64_t elements) const {
    return (phase[axis] + elements - 1) / block[axis] + 1;
  }
};

// A contiguous range of runs: the unit of work, progress, verification and resume.
struct Chunk {
  uint32_t first_run = 0;
  uint32_t run_count = 0;
  uint64_t size_bytes = 0;  // target bytes
};

// Immutable; depends on the layouts and options alone. Safe to use from any thread.
class Plan {
 public:
  std::span<const Chunk> chunks() const;
  std::span<const Run> runs() const;
  std::span<const Holder> holders() const;
  std::span<const Holder> holders_of(const Run& run) const;
  const Strides3& pattern(uint32_t index) const;
  std::span<const ScaleRun> block_scales() const;
  // Of the elements that a run writes, and of their scales where it writes those.
  uint64_t target_bytes(const Run& run) const;
  const Layout& target() const;
  std::span<const Layout> source_layouts() const;  // distinct by digest, sorted by digest
  const PlanOptions& options() const;
  const Digest& key() const;      // of target digest, source digests and options
  uint64_t size_bytes() const;    // target bytes that runs write
  uint64_t memory_bytes() const;  // what this plan itself occupies
  // Target box (catalog coordinates, bounding box) of a run, for messages.
  Box box_of(const Run& run) const;

 private:
  friend class PlanCompiler;
  struct Content;
  explicit Plan(std::shared_ptr<const Content> content);
  std::shared_ptr<const Content>
      content_;  // shared: immutable, used by several sessions of one process
};

// Proves coverage (I1) and lowers. Duplicated layouts among `sources` are one. Fails with
// kLayoutMismatch and the first findings in the message; diagnose() returns all of them.
Result<Plan> compile(const Layout& target, std::span<const Layout> sources,
                     const PlanOptions& options = {});
// The key that compile() would give, without compiling.
Digest plan_key(const Digest& target, std::span<const Digest> sources,
                const PlanOptions& options = {});

// Who serves each run in one cycle. `members[i]` are the sources (any ids of the caller's) whose
// layout is source_layouts()[i]; an empty list excludes that layout. Fills `choice` (one per run,
// preallocated by the caller): index into members, flattened in order. Spreads bytes so that no
// source is asked for more than its share where there is a choice; `spread` (for example the
// target's rank) rotates ties so that several targets start at different replicas. kUnavailable if
// a run has no member left, naming tensor and box. No allocation when `choice` and `load` have
// capacity.
struct Assignment {
  std::vector<uint32_t> choice;        // per run: flattened member index
  std::vector<uint32_t> holder;        // per run: index into Plan::holders()
  std::vector<uint64_t> load_bytes;    // per flattened member
  std::vector<uint32_t> first_member;  // per source layout: its first flattened member
};
Result<void> assign(const Plan& plan, std::span<const uint32_t> member_counts, uint64_t spread,
                    Assignment& out);

// What a set of plans (one per target rank) costs, for people. `source_names[i]` belongs to
// sources[i] of the compile call.
struct ExplainInput {
  std::string target_name;
  const Plan* plan = nullptr;
};
struct PairTraffic {
  uint32_t source = 0;
  uint32_t target = 0;
  uint64_t size_bytes = 0;
  uint64_t run_count = 0;
};
struct RunLengthBucket {
  uint64_t min_bytes = 0;  // contiguous bytes at the source
  uint64_t piece_count = 0;
  uint64_t size_bytes = 0;
};
struct Explanation {
  std::vector<std::string> sources;
  std::vector<std::string> targets;
  std::vector<PairTraffic> pairs;
  std::vector<RunLengthBucket> run_lengths;  // powers of two
  uint64_t total_bytes = 0;
  uint64_t busiest_source_bytes = 0;
  uint64_t busiest_target_bytes = 0;
  std::string busiest_link;  // the bound: what one refit cannot be faster than
  std::string to_text() const;
  std::string to_json() const;
  std::string to_svg() const;
};
// `source_layout_digests[i]` is the layout of the source called `source_names[i]`.
Result<Explanation> explain(std::span<const ExplainInput> targets,
                            std::span<const std::string> source_names,
                            std::span<const Digest> source_layout_digests);

}  // namespace transfuse
