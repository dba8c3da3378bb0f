// vLLM layouts: fused QKV and gate/up, repeated KV heads, padded vocabulary (docs/layouts.md,
// "vLLM").
#include <fmt/format.h>

#include <algorithm>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "models/family.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr int64_t kVocabularyMultiple = 64;  // of vLLM's VocabParallelEmbedding, whatever tp is

struct TpRank {
  int64_t rank;
  int64_t size;
};

// What one rank holds of one tensor; `pad_rows` rows of zeros follow it.
struct Part {
  Box box;
  int64_t pad_rows = 0;
};

Result<int64_t> divide(const ModelTensor& tensor, const char* what, int64_t count, TpRank tp) {
  if (count % tp.size != 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm tp={} does not divide the {} {} of {}", tp.size, count, what,
                             tensor.name)};
  }
  return count / tp.size;
}

Result<Part> cut_heads(const ModelTensor& tensor, TpRank tp) {
  Part part{.box = Box::whole(tensor.shape)};
  const int64_t head_rows = tensor.shape[0] / tensor.heads;
  if (tp.size <= tensor.heads) {
    TRANSFUSE_ASSIGN_OR_RETURN(const int64_t heads, divide(tensor, "heads", tensor.heads, tp));
    part.box.offset[0] = tp.rank * heads * head_rows;
    part.box.length[0] = heads * head_rows;
    return part;
  }
  if (tp.size % tensor.heads != 0) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("vllm tp={} is no multiple of the {} heads of {}", tp.size,
                             tensor.heads, tensor.name)};
  }
  part.box.offset[0] = tp.rank / (tp.size / tensor.heads) * head_rows;
  part.box.length[0] = head_rows;
  return part;
}

Result<Part> cut_vocabulary(const ModelTensor& tensor, TpRank tp) {
  const int64_t rows = tensor.shape[0];
  const int64_t padded =
      (rows + kVocabularyMultiple - 1) / kVocabularyMultiple * kVocabularyMultiple;
  TRANSFUSE_ASSIGN_OR_RETURN(const int64_t held, divide(tensor, "padded rows", padded, tp));
  Part part{.box = Box::whole(tensor.shape)};
  part.box.offset[0] = std::min(tp.rank * held, rows);
  part.box.length[0] = std::min((tp.rank + 1) * held, rows) - part.box.offset[0];
  part.pad_rows = held - part.box.length[0];
  return part;
}

Result<Part> cut(const ModelTensor& tensor, TpRank tp) {
  Part part{.box = Box::whole(tensor.shape)};
  switch (tensor.split) {
    case Split::kReplicated:
      return part;
    case Split::kHeads:
      return cut_heads(tensor, tp);
    case Split::kVocabulary:
      return cut_vocabulary(tensor, tp);
    case Split::kColumn:
    case Split::kRow: {
      const int dim = tensor.split == Split::kRow ? 1 : 0;
      TRANSFUSE_ASSIGN_OR_RETURN(part.box.length[dim], divide(tensor, dim == 0 ? "rows" : "columns",
                                                              tensor.shape[dim], tp));
      part.box.offset[dim] = tp.rank * part.box.length[dim];
      return part;
    }
  }
  check_failed(__FILE__, __LINE__, "a Split outside the enum");
}

const std::string& parameter_name(const ModelTensor& tensor) {
  return tensor.fused_into.empty() ? tensor.name : tensor.fused_into;
}

// Tensors [begin, end) share one parameter, one after another on dim 0.
Result<void> add_parameter(const Model& model, size_t begin, size_t end, TpRank tp, Dtype dtype,
                           LayoutBuilder& builder) {
  std::vector<Part> parts;
  int64_t element_count = 0;
  for (size_t i = begin; i < end; ++i) {
    TRANSFUSE_ASSIGN_OR_RETURN(Part part, cut(model.tensors[i], tp));
    const int64_t row = part.box.length.rank() > 1 ? part.box.length[1] : 1;
    element_count += part.box.element_count() + part.pad_rows * row;
    parts.push_back(std::move(part));
  }
  const auto p = builder.parameter({parameter_name(model.tensors[begin]), dtype, element_count});
  int64_t offset = 0;
  for (size_t i = begin; i < end; ++i) {
    const ModelTensor& tensor = model.tensors[i];
    const Part& part = parts[i - begin];
    builder.tile(builder.tensor({tensor.name, model.config.dtype, tensor.shape}), part.box, p,
                 offset);
    offset += part.box.element_count();
    if (part.pad_rows > 0) {
      const Dims length = {part.pad_rows, tensor.shape[1]};
      builder.fill(p, offset, length, row_major_strides(length));
      offset += length.product();
    }
  }
  return {};
}

Result<Layout> make(const Model& model, const ParallelSpec& spec, int64_t rank) {
  LayoutBuilder builder;
  const TpRank tp{.rank = rank, .size = spec.tp};
  for (size_t begin = 0; begin < model.tensors.size();) {
    const ModelTensor& first = model.tensors[begin];
    if (first.expert) {
      return Error{ErrorCode::kUnsupported,
                   fmt::format("vllm layouts of {} need fused experts, which are not described "
                               "yet; hf and fsdp layouts are",
                               model.config.architecture)};
    }
    size_t end = begin + 1;
    while (end < model.tensors.size() && !first.fused_into.empty() &&
           model.tensors[end].fused_into == first.fused_into) {
      ++end;
    }
    TRANSFUSE_RETURN_IF_ERROR(add_parameter(model, begin, end, tp, spec.dtype, builder));
    begin = end;
  }
  return builder.build();
}

}  // namespace

constinit const Framework kVllm = {.name = "vllm", .has_tp = true, .make_layout = make};

}  // namespace transfuse
