// The layout of one Megatron-Core rank from its modules as they are, checked against its spec.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

// A parameter or persistent buffer, as its framework describes it.
struct LiveTensor {
  std::string name;  // "{chunk}:{name}" where the rank has several model chunks
  Dtype dtype = Dtype::kBF16;
  Dims shape;  // dense and row-major in memory
  // Megatron-Core's attributes of a parameter. They are compared where the module marks any: its
  // versions and ways of initialization leave them unset.
  bool tensor_model_parallel = false;
  int64_t partition_dim = -1;
  int64_t partition_stride = 1;
};

// The model chunks of one rank.
struct LiveModule {
  std::vector<LiveTensor> tensors;
  // By chunk, the number in the whole model of each of its decoder layers: layer_number - 1.
  std::vector<std::vector<int64_t>> layers;
};

// Where the division of layers over pipeline stages is taken from.
enum class PipelineFrom : uint8_t {
  kSpec,    // the spec says it, and the module must agree
  kModule,  // the module says it, whatever rule its trainer has used; the spec says no layers
};

// The layout of a rank of `spec` (which must be of megatron) with the names of the module, its
// dtype for every parameter, and its padding of the vocabulary. Sizes and `ranks` are those of the
// caller's groups. Fails with kLayoutMismatch, naming tensor, expected and found, where the module
// has other shapes, other tensors, another partition or other layers than the spec means.
Result<Layout> make_layout(const ModelConfig& config, const ParallelSpec& spec,
                           const ParallelRanks& ranks, const LiveModule& module,
                           PipelineFrom pipeline);

}  // namespace transfuse
