// Boxes become strided runs: at most three levels each, merged wherever they touch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "plan/bounds.h"
#include "plan/intersect.h"
#include "transfuse/plan.h"

namespace transfuse {

// Strides that many runs share, each once. Used from one thread.
class PatternTable {
 public:
  PatternTable();
  uint32_t intern(const Strides3& strides);
  const Strides3& operator[](uint32_t index) const { return patterns_[index]; }
  std::vector<Strides3>& patterns() { return patterns_; }

 private:
  void insert_slot(uint32_t index);
  std::vector<Strides3> patterns_;
  std::vector<uint32_t> slots_;  // index + 1, or 0; a power of two of them
};

// Collects runs chunk by chunk. Used from one thread.
class Lowering {
 public:
  void reserve(size_t runs, size_t holders);
  // Runs are merged within a chunk only.
  void begin_chunk() { chunk_first_run_ = runs_.size(); }
  // What follows lies in this tile, which must outlive the calls of add().
  void begin_tile(const Tile& target, const Dims& tensor_shape);
  // Adds `piece` (a box within the tile, at most 2^32 - 1 elements) that all of `holders` hold.
  void add(const Bounds& piece, std::span<const HolderTile> holders);
  // Adds whole blocks that are quantised; `scales` is the target tile for their scales.
  void add_quantizing(const Bounds& piece, std::span<const HolderTile> holders,
                      const Layout& target, const Quantization& quantization, const Tile& scales);
  // Adds a piece of fp8 that each of `holders` holds with its scales.
  void add_dequantizing(const Bounds& piece, std::span<const HolderTile> holders,
                        std::span<const Layout> sources);

  // Moved out by the compiler at the end.
  std::vector<Run>& runs() { return runs_; }
  std::vector<Holder>& holders() { return holders_; }
  std::vector<Strides3>& patterns() { return patterns_.patterns(); }
  std::vector<ScaleRun>& block_scales() { return block_scales_; }

 private:
  // One dimension of a piece; the stride of holder h is holder_strides_[h * kMaxRank + slot].
  struct Level {
    int64_t count = 1;
    int64_t target_stride = 0;
    int64_t index_stride = 0;
    int slot = 0;
  };
  void locate(const Bounds& piece, std::span<const HolderTile> holders, Run& run);
  void fold(const Bounds& piece, std::span<const HolderTile> holders);
  bool fold_into(Level& inner, int dimension, int64_t target_stride, int64_t index_stride,
                 std::span<const HolderTile> holders);
  void order_levels();
  void set_patterns(Run& run);
  void enumerate_outer(Run run);
  void set_matrix(const Bounds& piece, std::span<const HolderTile> holders, Run& run);
  uint32_t add_scales(const ScaleRun& scales);
  void emit(const Run& run);
  void append(const Run& run);
  bool merge_into_last(const Run& added);
  bool join(Run& last, const Run& added, int level);

  std::vector<Run> runs_;
  std::vector<Holder> holders_;
  PatternTable patterns_;
  std::vector<ScaleRun> block_scales_;
  size_t chunk_first_run_ = 0;

  const Tile* tile_ = nullptr;
  int rank_ = 0;
  int64_t index_strides_[kMaxRank] = {};

  // The piece in hand. Levels innermost first.
  Level levels_[kMaxRank];
  int level_count_ = 0;
  std::vector<int64_t> holder_strides_;
  std::vector<Holder> piece_holders_;
  std::vector<uint32_t> joined_patterns_;
};

}  // namespace transfuse
