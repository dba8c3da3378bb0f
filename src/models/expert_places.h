// Where the experts of a layer lie in the stack of one rank of an engine.
#pragma once

#include <cstdint>
#include <vector>

#include "models/family.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// Used from one thread. The model and the spec outlive it.
class ExpertPlaces {
 public:
  // Rank `rank` of `size` that share the experts. kInvalidArgument where the spec's redundant
  // experts or its expert map do not fit the model, naming layer and expert.
  static Result<ExpertPlaces> make(const Model& model, const ParallelSpec& spec, int64_t rank,
                                   int64_t size);

  // Places in a stack: the same number on every layer.
  int64_t count() const { return end_ - begin_; }
  // Those of an expert, ascending: none where other ranks have it, several where it has copies.
  std::vector<int64_t> of(int64_t layer, int64_t expert) const;

 private:
  ExpertPlaces(const Model& model, const ParallelSpec& spec) : model_(&model), spec_(&spec) {}
  int64_t logical(int64_t layer, int64_t physical) const;

  const Model* model_;
  const ParallelSpec* spec_;
  int64_t rank_ = 0;
  int64_t size_ = 1;
  int64_t begin_ = 0;  // of all physical experts; round robin: of this rank's
  int64_t end_ = 0;
  int64_t first_mapped_layer_ = 0;  // whose row of the map is the first
};

}  // namespace transfuse
