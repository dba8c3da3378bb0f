// What a layout says of fp8 tensors and their scales, checked.
#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "layout/assembly.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

int64_t blocks(int64_t length, int64_t block) { return length / block + (length % block != 0); }

Result<void> check_shapes(const TensorSpec& tensor, const TensorSpec& scales, Quantization& q) {
  if (tensor.shape.rank() != 2) {
    return invalid(fmt::format("tensor {} {} has block scales: expected rows and columns",
                               tensor.name, tensor.shape.to_string()));
  }
  if (q.block_rows < 1 || q.block_columns < 1) {
    return invalid(
        fmt::format("the blocks of tensor {} have {} rows and {} columns: expected 1 or "
                    "more of both",
                    tensor.name, q.block_rows, q.block_columns));
  }
  q.block_rows = std::min(q.block_rows, std::max<int64_t>(1, tensor.shape[0]));
  q.block_columns = std::min(q.block_columns, std::max<int64_t>(1, tensor.shape[1]));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (q.block_rows > kMost || q.block_columns > kMost) {
    return invalid(
        fmt::format("the blocks of tensor {} have {} rows and {} columns: expected less "
                    "than 2^31 of both",
                    tensor.name, q.block_rows, q.block_columns));
  }
  const Dims expected = {blocks(tensor.shape[0], q.block_rows),
                         blocks(tensor.shape[1], q.block_columns)};
  const bool one = expected.product() == 1 && scales.shape.product() == 1;
  if (!one && !(scales.shape == expected)) {
    return invalid(
        fmt::format("tensor {} holds the scales of {} {} in blocks of {} by {}: expected "
                    "shape {}, found {}",
                    scales.name, tensor.name, tensor.shape.to_string(), q.block_rows,
                    q.block_columns, expected.to_string(), scales.shape.to_string()));
  }
  return {};
}

}  // namespace

Result<void> check_quantizations(LayoutParts& parts) {
  if (parts.quantizations.empty()) return {};
  // Per tensor: in what dtype its tiles must lie; none where nothing is asked.
  enum class Role : uint8_t { kNone, kNumbers, kScales };
  std::vector<Role> roles(parts.tensors.size(), Role::kNone);
  for (Quantization& q : parts.quantizations) {
    if (q.tensor >= parts.tensors.size() || q.scales >= parts.tensors.size()) {
      return invalid(fmt::format("block scales name tensors {} and {}: expected handles below {}",
                                 q.tensor, q.scales, parts.tensors.size()));
    }
    TRANSFUSE_RETURN_IF_ERROR(check_shapes(parts.tensors[q.tensor], parts.tensors[q.scales], q));
    for (const auto& [tensor, role] :
         {std::pair(q.tensor, Role::kNumbers), std::pair(q.scales, Role::kScales)}) {
      if (std::exchange(roles[tensor], role) != Role::kNone) {
        return invalid(fmt::format("tensor {} has or is block scales twice: expected once",
                                   parts.tensors[tensor].name));
      }
    }
  }
  for (const Tile& tile : parts.tiles) {
    const Role role = roles[tile.tensor];
    if (role == Role::kNone) continue;
    const ParameterSpec& parameter = parts.parameters[tile.parameter];
    const Dtype expected = role == Role::kNumbers ? Dtype::kF8E4M3 : Dtype::kF32;
    if (parameter.dtype == expected) continue;
    return invalid(
        fmt::format("tensor {}, which {} block scales, lies in parameter {}: expected {}, "
                    "found {}",
                    parts.tensors[tile.tensor].name, role == Role::kNumbers ? "has" : "is",
                    parameter.name, dtype_name(expected), dtype_name(parameter.dtype)));
  }
  std::ranges::sort(parts.quantizations, {}, &Quantization::tensor);
  return {};
}

}  // namespace transfuse
