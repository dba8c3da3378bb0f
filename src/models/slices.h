// Parameters that a framework makes by concatenating slices of logical matrices along dim 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {

// Half-open.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t count() const { return end - begin; }
};
// Rows and columns of a logical matrix; a vector's columns are [0, 1).
struct Slice {
  Range rows;
  Range columns;
};
Slice whole_slice(const Piece& piece);
// Share `rank` of `size` equal ones of `count`, which `size` divides.
Range share_of(int64_t count, int64_t rank, int64_t size);

// Where a slice goes: slices of one parameter follow each other in the order of `place`.
struct Destination {
  std::string parameter;
  Dtype dtype = Dtype::kBF16;
  int64_t place = 0;
};

// Used from one thread. The model outlives it.
class Slices {
 public:
  explicit Slices(const Model& model) : model_(model) {}
  // What `piece` holds of `slice` of its matrix. All pieces of a matrix are added with equal slices
  // to one place. Scales are cut with their weight: kInvalidArgument where that cuts a block.
  Result<void> add(const Destination& to, const ModelTensor& tensor, const Piece& piece,
                   const Slice& slice);
  // Rows that no tensor covers, as wide as the parameter's others or, where it has none, `width`.
  void add_zeros(const Destination& to, int64_t rows, int64_t width = -1);
  Result<Layout> build();

 private:
  struct Part {
    int64_t place = 0;
    int64_t rows = 0;
    bool zeros = false;
  };
  struct Parameter {
    ParameterSpec spec;
    int64_t width = -1;  // elements of a row; -1: not known yet
    std::vector<Part> parts;
  };
  struct PendingTile {
    size_t parameter = 0;
    int64_t place = 0;
    uint32_t tensor = 0;
    Tile tile;  // its element offset counts within its part
  };
  void add_turns(const PendingTile& whole, const ModelTensor& tensor, const Piece& piece);

  size_t parameter(const Destination& to);

  const Model& model_;
  LayoutBuilder builder_;
  std::unordered_map<std::string, size_t> index_;
  std::vector<Parameter> parameters_;
  std::vector<PendingTile> tiles_;
};

}  // namespace transfuse
