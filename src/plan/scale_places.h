// Which tile of a target's scales each tile of its fp8 tensors writes, where sources hold neither.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "plan/source_index.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

// Used from one thread. The layout and the index outlive it.
class ScalePlaces {
 public:
  // A tensor is quantised on its way where the target says how and no source holds its scales.
  // Appends what is wrong, at most until `findings` holds `limit`; then its tiles have no place.
  ScalePlaces(const Layout& target, const SourceIndex& index, size_t limit,
              std::vector<Finding>& findings);

  std::optional<Quantization> quantization_of(uint32_t tensor) const {
    if (quantizing_.empty() || quantizing_[tensor] == 0) return std::nullopt;
    return target_.quantizations()[quantizing_[tensor] - 1];
  }
  // True for scales that come with the tensor they are of.
  bool written(uint32_t tensor) const { return !written_.empty() && written_[tensor] != 0; }
  // Null: something is wrong with this tensor.
  const Tile* scales_of(const Tile& tile) const;

 private:
  bool place(const Quantization& quantization, size_t limit, std::vector<Finding>& findings);

  const Layout& target_;
  std::vector<uint32_t> quantizing_;  // per tensor: index into quantizations() plus 1
  std::vector<uint8_t> written_;      // per tensor
  std::vector<const Tile*> places_;   // per tile of the target
};

}  // namespace transfuse
