// One tensor seen in shapes that differ only in how dimensions are split: [4, 6] as [4, 3, 2]. The
// row-major index of an element is the same in all of them.
#pragma once

#include <vector>

#include "transfuse/layout.h"

namespace transfuse {

// True if `fine` splits dimensions of `coarse` and changes nothing else; so do equal shapes, and
// dimensions of length 1 count for nothing.
bool splits(const Dims& fine, const Dims& coarse);

// Appends what `tile`, of a tensor of shape `coarse`, is in shape `fine`, which splits it: one tile
// where its box begins and ends with the parts, else up to three for each dimension cut in two.
void append_split(const Tile& tile, const Dims& coarse, const Dims& fine, std::vector<Tile>& out);

// The smallest box in shape `coarse` around `box` in shape `fine`, which splits it.
Box joined_box(const Box& box, const Dims& fine, const Dims& coarse);

}  // namespace transfuse
