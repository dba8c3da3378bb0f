// Validates the parts of a layout, brings them into their one order, and digests them.
#include "layout/assembly.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

Unexpected invalid(std::string message) {
  return {Error{ErrorCode::kInvalidArgument, std::move(message)}};
}

Result<void> check_name(std::string_view what, std::string_view name) {
  if (name.empty()) return invalid(fmt::format("a {} has an empty name", what));
  if (name.size() > kMaxNameBytes) {
    return invalid(fmt::format("the name of {} \"{}...\" has {} bytes: expected at most {}", what,
                               name.substr(0, 64), name.size(), kMaxNameBytes));
  }
  // Names go into messages, JSON and pictures of other processes.
  const auto printable = [](char c) { return c >= 0x20 && c < 0x7F; };
  if (!std::ranges::all_of(name, printable)) {
    std::string shown(name);
    std::ranges::replace_if(shown, std::not_fn(printable), '?');
    return invalid(
        fmt::format("the name of {} \"{}\" has bytes that are not printable ASCII", what, shown));
  }
  return {};
}

// The product even where some other dimension is 0, so that strides fit too.
bool fits(const Dims& shape) {
  int64_t product = 1;
  for (const int64_t value : shape.values()) {
    if (__builtin_mul_overflow(product, std::max<int64_t>(value, 1), &product)) return false;
  }
  return product <= kMaxElements;
}

bool any_negative(const Dims& dims) {
  return std::ranges::any_of(dims.values(), [](int64_t v) { return v < 0; });
}

Result<void> check_tensor(const TensorSpec& tensor) {
  TRANSFUSE_RETURN_IF_ERROR(check_name("tensor", tensor.name));
  if (any_negative(tensor.shape) || !fits(tensor.shape)) {
    return invalid(
        fmt::format("tensor {} has shape {}: expected no negative extent and at most {} elements",
                    tensor.name, tensor.shape.to_string(), kMaxElements));
  }
  return {};
}

Result<void> check_parameter(const ParameterSpec& parameter) {
  TRANSFUSE_RETURN_IF_ERROR(check_name("parameter", parameter.name));
  if (parameter.element_count < 0 || parameter.element_count > kMaxElements) {
    return invalid(fmt::format("parameter {} has {} elements: expected 0 to {}", parameter.name,
                               parameter.element_count, kMaxElements));
  }
  return {};
}

// One past the last element that a strided piece touches; nullopt where that exceeds int64_t.
std::optional<int64_t> end_of(int64_t element_offset, const Dims& length, const Dims& strides) {
  int64_t last = element_offset;
  for (int i = 0; i < length.rank(); ++i) {
    int64_t reach = 0;
    if (__builtin_mul_overflow(length[i] - 1, strides[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return std::nullopt;
    }
  }
  if (last == INT64_MAX) return std::nullopt;
  return last + 1;
}

// A piece (tile or fill) that is not empty lies inside its parameter. `what` names it in messages.
template <typename Describe>
Result<void> check_reach(const ParameterSpec& parameter, int64_t element_offset, const Dims& length,
                         Dims& strides, const Describe& describe) {
  for (int i = 0; i < length.rank(); ++i) {
    if (length[i] == 1) {
      strides[i] = 1;
    } else if (strides[i] < 1) {
      return invalid(fmt::format("{} in parameter {} has element strides {}: expected at least 1",
                                 describe(), parameter.name, strides.to_string()));
    }
  }
  if (element_offset < 0) {
    return invalid(fmt::format("{} in parameter {} begins at element {}: expected 0 or more",
                               describe(), parameter.name, element_offset));
  }
  const auto end = end_of(element_offset, length, strides);
  if (!end || *end > parameter.element_count) {
    return Error{ErrorCode::kLayoutMismatch,
                 fmt::format("{} reaches element {} of parameter {}, which has {} elements",
                             describe(), end ? std::to_string(*end - 1) : "2^63 or more",
                             parameter.name, parameter.element_count)};
  }
  return {};
}

Result<void> check_box(const TensorSpec& tensor, const Box& box, const Dims& strides) {
  const int rank = tensor.shape.rank();
  if (box.offset.rank() != rank || box.length.rank() != rank || strides.rank() != rank) {
    return invalid(fmt::format(
        "a tile of tensor {} has offset rank {}, length rank {}, stride rank {}: expected {}",
        tensor.name, box.offset.rank(), box.length.rank(), strides.rank(), rank));
  }
  for (int i = 0; i < rank; ++i) {
    if (box.offset[i] < 0 || box.length[i] < 0 || box.offset[i] > tensor.shape[i] ||
        box.length[i] > tensor.shape[i] - box.offset[i]) {
      return invalid(fmt::format(
          "a tile of tensor {} has offset {} and length {}: expected a box "
          "inside shape {}",
          tensor.name, box.offset.to_string(), box.length.to_string(), tensor.shape.to_string()));
    }
  }
  return {};
}

std::strong_ordering compare(const Dims& a, const Dims& b) {
  const auto x = a.values();
  const auto y = b.values();
  return std::lexicographical_compare_three_way(x.begin(), x.end(), y.begin(), y.end());
}

// Of tiles of one tensor.
bool tile_before(const Tile& a, const Tile& b) {
  if (const auto c = compare(a.box.offset, b.box.offset); c != 0) return c < 0;
  if (const auto c = compare(a.box.length, b.box.length); c != 0) return c < 0;
  if (a.parameter != b.parameter) return a.parameter < b.parameter;
  if (a.element_offset != b.element_offset) return a.element_offset < b.element_offset;
  return compare(a.element_strides, b.element_strides) < 0;
}

bool fill_before(const Fill& a, const Fill& b) {
  if (a.parameter != b.parameter) return a.parameter < b.parameter;
  if (a.element_offset != b.element_offset) return a.element_offset < b.element_offset;
  if (const auto c = compare(a.length, b.length); c != 0) return c < 0;
  return compare(a.element_strides, b.element_strides) < 0;
}

// The order in which `specs` ascend by name. `guess` is taken where it is right: parameters often
// bear the names of the tensors and come in their order.
template <typename Spec>
std::vector<uint32_t> order_by_name(const std::vector<Spec>& specs,
                                    const std::vector<uint32_t>& guess) {
  const auto before = [&](uint32_t a, uint32_t b) { return specs[a].name < specs[b].name; };
  if (guess.size() == specs.size() && std::ranges::is_sorted(guess, before)) return guess;
  std::vector<uint32_t> order(specs.size());
  std::iota(order.begin(), order.end(), 0U);
  if (!std::ranges::is_sorted(order, before)) std::ranges::sort(order, before);
  return order;
}

// Brings `specs` into `order`; returns the new position of each old one.
template <typename Spec>
std::vector<uint32_t> reorder(std::vector<Spec>& specs, const std::vector<uint32_t>& order) {
  std::vector<Spec> sorted;
  std::vector<uint32_t> position(specs.size());
  sorted.reserve(specs.size());
  for (const uint32_t old : order) {
    position[old] = static_cast<uint32_t>(sorted.size());
    sorted.push_back(std::move(specs[old]));
  }
  specs = std::move(sorted);
  return position;
}

template <typename Spec, typename Check>
Result<void> check_specs(const std::vector<Spec>& specs, const Check& check, size_t& name_bytes) {
  for (const Spec& spec : specs) {
    TRANSFUSE_RETURN_IF_ERROR(check(spec));
    name_bytes += spec.name.size();
  }
  if (name_bytes > kMaxTotalNameBytes) {
    return invalid(fmt::format("the names of a layout have {} bytes: expected at most {}",
                               name_bytes, kMaxTotalNameBytes));
  }
  return {};
}

// Checks every tile, drops the empty ones; returns the bytes that the others cover.
Result<uint64_t> check_and_trim_tiles(LayoutParts& parts) {
  int64_t bytes = 0;
  size_t kept = 0;
  for (Tile& tile : parts.tiles) {
    if (tile.tensor >= parts.tensors.size() || tile.parameter >= parts.parameters.size()) {
      return invalid(
          fmt::format("a tile names tensor {} and parameter {}: expected handles below "
                      "{} and {}",
                      tile.tensor, tile.parameter, parts.tensors.size(), parts.parameters.size()));
    }
    const TensorSpec& tensor = parts.tensors[tile.tensor];
    const ParameterSpec& parameter = parts.parameters[tile.parameter];
    TRANSFUSE_RETURN_IF_ERROR(check_box(tensor, tile.box, tile.element_strides));
    const int64_t elements = tile.box.element_count();
    if (elements == 0) continue;
    TRANSFUSE_RETURN_IF_ERROR(
        check_reach(parameter, tile.element_offset, tile.box.length, tile.element_strides, [&] {
          return fmt::format("the tile {} of tensor {}", tile.box.to_string(), tensor.name);
        }));
    if (__builtin_add_overflow(bytes, elements * dtype_size_bytes(parameter.dtype), &bytes)) {
      return invalid("the tiles of a layout cover 2^63 bytes or more");
    }
    parts.tiles[kept++] = tile;
  }
  parts.tiles.resize(kept);
  return static_cast<uint64_t>(bytes);
}

Result<void> check_and_trim_fills(LayoutParts& parts) {
  size_t kept = 0;
  for (Fill& fill : parts.fills) {
    if (fill.parameter >= parts.parameters.size()) {
      return invalid(fmt::format("a fill names parameter {}: expected a handle below {}",
                                 fill.parameter, parts.parameters.size()));
    }
    const ParameterSpec& parameter = parts.parameters[fill.parameter];
    if (fill.length.rank() != fill.element_strides.rank() || any_negative(fill.length)) {
      return invalid(
          fmt::format("a fill of parameter {} has length {} and element strides {}: "
                      "expected equal ranks and no negative length",
                      parameter.name, fill.length.to_string(), fill.element_strides.to_string()));
    }
    if (fill.length.product() == 0) continue;
    TRANSFUSE_RETURN_IF_ERROR(
        check_reach(parameter, fill.element_offset, fill.length, fill.element_strides,
                    [&] { return fmt::format("a fill of length {}", fill.length.to_string()); }));
    parts.fills[kept++] = fill;
  }
  parts.fills.resize(kept);
  return {};
}

Result<uint64_t> parameter_bytes(std::span<const ParameterSpec> parameters) {
  int64_t bytes = 0;
  for (const ParameterSpec& parameter : parameters) {
    if (__builtin_add_overflow(bytes, parameter.element_count * dtype_size_bytes(parameter.dtype),
                               &bytes)) {
      return invalid("the parameters of a layout have 2^63 bytes or more");
    }
  }
  return static_cast<uint64_t>(bytes);
}

// Groups by tensor in one pass (a layout has few tiles per tensor), then sorts each group.
std::vector<uint32_t> sort_tiles(std::vector<Tile>& tiles, size_t tensor_count) {
  std::vector<uint32_t> first(tensor_count + 1, 0);
  for (const Tile& tile : tiles) ++first[tile.tensor + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  const auto before = [](const Tile& a, const Tile& b) {
    return a.tensor != b.tensor ? a.tensor < b.tensor : tile_before(a, b);
  };
  if (std::ranges::is_sorted(tiles, before)) return first;
  std::vector<uint32_t> next(first.begin(), first.end() - 1);
  std::vector<Tile> grouped(tiles.size());
  for (const Tile& tile : tiles) grouped[next[tile.tensor]++] = tile;
  tiles = std::move(grouped);
  for (size_t i = 0; i < tensor_count; ++i) {
    std::sort(tiles.begin() + first[i], tiles.begin() + first[i + 1], tile_before);
  }
  return first;
}

// Checks what is said, drops what says nothing, and brings tensors to their new positions.
Result<LayoutWords> check_words(LayoutWords&& words, std::span<const TensorSpec> tensors,
                                std::span<const uint32_t> position) {
  TRANSFUSE_RETURN_IF_ERROR(check_kind("the layout", words.kind));
  LayoutWords checked{.kind = std::move(words.kind)};
  size_t bytes = 0;
  for (auto& [tensor, metadata] : words.metadata) {
    if (tensor >= position.size()) {
      return invalid(fmt::format("metadata is of tensor {}: expected a handle below {}", tensor,
                                 position.size()));
    }
    if (metadata.empty()) continue;
    const uint32_t at = position[tensor];
    TRANSFUSE_RETURN_IF_ERROR(check_metadata("tensor " + tensors[at].name, metadata));
    for (const auto& [key, value] : metadata) bytes += key.size() + value.size();
    checked.metadata.emplace(at, std::move(metadata));
  }
  if (bytes > kMaxTotalMetadataBytes) {
    return invalid(
        fmt::format("the metadata of a layout's tensors has {} bytes: expected at most {}", bytes,
                    kMaxTotalMetadataBytes));
  }
  return checked;
}

}  // namespace

Result<Layout> LayoutAssembly::assemble(LayoutParts&& parts, std::string* encoding) {
  if (parts.tiles.size() > kMaxTiles || parts.fills.size() > kMaxTiles) {
    return invalid(fmt::format("a layout has {} tiles and {} fills: expected at most {} of each",
                               parts.tiles.size(), parts.fills.size(), kMaxTiles));
  }
  size_t name_bytes = 0;
  TRANSFUSE_RETURN_IF_ERROR(check_specs(parts.tensors, check_tensor, name_bytes));
  TRANSFUSE_RETURN_IF_ERROR(check_specs(parts.parameters, check_parameter, name_bytes));

  auto content = std::make_shared<Layout::Content>();
  TRANSFUSE_ASSIGN_OR_RETURN(content->parameter_bytes, parameter_bytes(parts.parameters));
  TRANSFUSE_ASSIGN_OR_RETURN(content->tile_bytes, check_and_trim_tiles(parts));
  TRANSFUSE_RETURN_IF_ERROR(check_and_trim_fills(parts));

  const auto tensor_order = order_by_name(parts.tensors, {});
  const auto parameter_order = order_by_name(parts.parameters, tensor_order);
  const auto tensor_position = reorder(parts.tensors, tensor_order);
  const auto parameter_position = reorder(parts.parameters, parameter_order);
  for (Tile& tile : parts.tiles) {
    tile.tensor = tensor_position[tile.tensor];
    tile.parameter = parameter_position[tile.parameter];
  }
  for (Fill& fill : parts.fills) fill.parameter = parameter_position[fill.parameter];
  for (Quantization& q : parts.quantizations) {
    if (q.tensor < tensor_position.size()) q.tensor = tensor_position[q.tensor];
    if (q.scales < tensor_position.size()) q.scales = tensor_position[q.scales];
  }
  TRANSFUSE_RETURN_IF_ERROR(check_quantizations(parts));
  content->first_tile = sort_tiles(parts.tiles, parts.tensors.size());
  std::ranges::sort(parts.fills, fill_before);

  TRANSFUSE_ASSIGN_OR_RETURN(content->words,
                             check_words(std::move(parts.words), parts.tensors, tensor_position));
  content->tensors = std::move(parts.tensors);
  content->parameters = std::move(parts.parameters);
  // Lives long, and a tile has 232 bytes; but less slack is not worth the copy.
  if (parts.tiles.capacity() > parts.tiles.size() / 4 * 5) parts.tiles.shrink_to_fit();
  content->tiles = std::move(parts.tiles);
  content->fills = std::move(parts.fills);
  content->quantizations = std::move(parts.quantizations);
  std::string bytes = encode_parts(content->tensors, content->parameters, content->tiles,
                                   content->fills, content->quantizations, content->words);
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  content->digest = Digest{.high = hash.high64, .low = hash.low64};
  if (encoding != nullptr) *encoding = std::move(bytes);
  return Layout(std::move(content));
}

}  // namespace transfuse
