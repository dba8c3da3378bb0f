// Modules of transformers 5: experts of a layer stacked in two tensors, everything else whole.
#pragma once

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// Of a rank of FSDP2 over spec.dp ranks; one rank holds all.
Result<Layout> stacked_experts_layout(const Model& model, const ParallelSpec& spec,
                                      const ParallelRanks& ranks);

}  // namespace transfuse
