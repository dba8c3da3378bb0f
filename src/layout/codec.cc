// Layouts and bindings as bytes: canonical, so that equal layouts are equal bytes; docs/layouts.md.
#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/bytes.h"
#include "layout/assembly.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr uint32_t kLayoutMagic = 0x594C4654;   // "TFLY"
constexpr uint32_t kBindingMagic = 0x49424654;  // "TFBI"
constexpr uint64_t kVersion = 1;
// Of a layout that has a kind or metadata; one that has none is of version 1, so that each has one
// encoding.
constexpr uint64_t kVersionWithWords = 2;
// Of a layout that has quantizations; its words follow, empty or not.
constexpr uint64_t kVersionWithQuantizations = 3;

// A name is a tensor, a parameter, or both: each name travels once.
constexpr uint8_t kIsTensor = 1;
constexpr uint8_t kIsParameter = 2;
// What a tile need not say.
constexpr uint8_t kWholeTensor = 1;
constexpr uint8_t kRowMajor = 2;

uint64_t as_unsigned(int64_t value) { return static_cast<uint64_t>(value); }

void put_dims(ByteWriter& out, const Dims& dims) {
  for (const int64_t value : dims.values()) out.varint(as_unsigned(value));
}

void put_names(ByteWriter& out, std::span<const TensorSpec> tensors,
               std::span<const ParameterSpec> parameters) {
  size_t t = 0;
  size_t p = 0;
  std::string_view previous;
  while (t < tensors.size() || p < parameters.size()) {
    const bool has_tensor =
        t < tensors.size() && (p == parameters.size() || tensors[t].name <= parameters[p].name);
    const bool has_parameter =
        p < parameters.size() && (t == tensors.size() || parameters[p].name <= tensors[t].name);
    const std::string_view name = has_tensor ? tensors[t].name : parameters[p].name;
    const auto shared =
        static_cast<size_t>(std::ranges::mismatch(name, previous).in1 - name.begin());
    out.varint(shared);
    out.text(name.substr(shared));
    out.fixed(
        static_cast<uint8_t>((has_tensor ? kIsTensor : 0) | (has_parameter ? kIsParameter : 0)));
    if (has_tensor) {
      const TensorSpec& tensor = tensors[t++];
      out.fixed(static_cast<uint8_t>(tensor.dtype));
      out.fixed(static_cast<uint8_t>(tensor.shape.rank()));
      put_dims(out, tensor.shape);
    }
    if (has_parameter) {
      const ParameterSpec& parameter = parameters[p++];
      out.fixed(static_cast<uint8_t>(parameter.dtype));
      out.varint(as_unsigned(parameter.element_count));
    }
    previous = name;
  }
}

// The strides that row-major order gives to `length`, in canonical form.
bool is_row_major(const Dims& length, const Dims& strides) {
  int64_t expected = 1;
  for (int i = length.rank() - 1; i >= 0; --i) {
    if (length[i] == 1) continue;
    if (strides[i] != expected) return false;
    expected *= length[i];
  }
  return true;
}

Dims canonical_row_major(const Dims& length) {
  Dims strides = row_major_strides(length);
  for (int i = 0; i < length.rank(); ++i) {
    if (length[i] == 1) strides[i] = 1;
  }
  return strides;
}

void put_tile(ByteWriter& out, const Tile& tile, uint32_t previous_tensor, const Dims& shape) {
  const bool whole = tile.box == Box::whole(shape);
  const bool row_major = is_row_major(tile.box.length, tile.element_strides);
  out.varint(tile.tensor - previous_tensor);
  out.fixed(static_cast<uint8_t>((whole ? kWholeTensor : 0) | (row_major ? kRowMajor : 0)));
  out.varint(tile.parameter);
  out.varint(as_unsigned(tile.element_offset));
  if (!whole) {
    put_dims(out, tile.box.offset);
    put_dims(out, tile.box.length);
  }
  if (!row_major) put_dims(out, tile.element_strides);
}

void put_words(ByteWriter& out, const LayoutWords& words) {
  out.text(words.kind);
  out.varint(words.metadata.size());
  uint32_t previous = 0;
  for (const auto& [tensor, metadata] : words.metadata) {
    out.varint(tensor - previous);
    out.varint(metadata.size());
    for (const auto& [key, value] : metadata) {
      out.text(key);
      out.text(value);
    }
    previous = tensor;
  }
}

void put_quantizations(ByteWriter& out, std::span<const Quantization> quantizations) {
  out.varint(quantizations.size());
  uint32_t previous = 0;
  for (const Quantization& q : quantizations) {
    out.varint(q.tensor - previous);
    out.varint(q.scales);
    out.varint(as_unsigned(q.block_rows));
    out.varint(as_unsigned(q.block_columns));
    previous = q.tensor;
  }
}

Unexpected corrupt(std::string message) { return {Error{ErrorCode::kCorrupt, std::move(message)}}; }

// A number that must fit in int64_t; beyond it the reader's caller finds -1, which no field allows.
int64_t get_int64(ByteReader& in) {
  const uint64_t value = in.varint();
  return value > uint64_t{INT64_MAX} ? -1 : static_cast<int64_t>(value);
}

bool get_dims(ByteReader& in, int rank, Dims& dims) {
  dims = Dims();
  for (int i = 0; i < rank; ++i) {
    dims.push_back(get_int64(in));
    if (dims[i] < 0) return false;
  }
  return in.ok();
}

bool get_dtype(ByteReader& in, Dtype& dtype) {
  const auto value = in.fixed<uint8_t>();
  if (value >= kDtypeCount) return false;
  dtype = static_cast<Dtype>(value);
  return in.ok();
}

bool get_rank(ByteReader& in, int& rank) {
  rank = in.fixed<uint8_t>();
  return in.ok() && rank <= kMaxRank;
}

Result<void> get_names(ByteReader& in, LayoutParts& parts) {
  const uint64_t count = in.count(5);  // shared, size, kind, and two bytes of tensor or parameter
  std::string name;
  size_t name_bytes = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t shared = in.varint();
    const std::string_view rest = in.text(kMaxNameBytes);
    const auto kind = in.fixed<uint8_t>();
    if (!in.ok() || shared > name.size() || shared + rest.size() > kMaxNameBytes) {
      return corrupt(fmt::format("layout: name {} is malformed", i));
    }
    // Strictly ascending, so that no name comes twice.
    if (i > 0 && rest <= std::string_view(name).substr(shared)) {
      return corrupt(fmt::format("layout: name {} is not after the name before it", i));
    }
    name.resize(shared);
    name += rest;
    name_bytes += name.size();
    if (kind == 0 || kind > (kIsTensor | kIsParameter) || name_bytes > kMaxTotalNameBytes) {
      return corrupt(fmt::format("layout: name {} has kind {} and ends at byte {} of all names", i,
                                 kind, name_bytes));
    }
    if ((kind & kIsTensor) != 0) {
      TensorSpec& tensor = parts.tensors.emplace_back();
      int rank = 0;
      tensor.name = name;
      if (!get_dtype(in, tensor.dtype) || !get_rank(in, rank) ||
          !get_dims(in, rank, tensor.shape)) {
        return corrupt(fmt::format("layout: the dtype or shape of tensor {} is malformed", i));
      }
    }
    if ((kind & kIsParameter) != 0) {
      ParameterSpec& parameter = parts.parameters.emplace_back();
      parameter.name = name;
      if (!get_dtype(in, parameter.dtype) || (parameter.element_count = get_int64(in)) < 0) {
        return corrupt(fmt::format("layout: the dtype or size of parameter {} is malformed", i));
      }
    }
  }
  return {};
}

bool get_tile(ByteReader& in, const LayoutParts& parts, uint64_t& tensor, Tile& tile) {
  const uint64_t step = in.varint();
  const auto flags = in.fixed<uint8_t>();
  const uint64_t parameter = in.varint();
  tile.element_offset = get_int64(in);
  if (!in.ok() || step >= parts.tensors.size() || flags > (kWholeTensor | kRowMajor) ||
      parameter >= parts.parameters.size() || tile.element_offset < 0) {
    return false;
  }
  tensor += step;
  if (tensor >= parts.tensors.size()) return false;
  const Dims& shape = parts.tensors[tensor].shape;
  tile.tensor = static_cast<uint32_t>(tensor);
  tile.parameter = static_cast<uint32_t>(parameter);
  if ((flags & kWholeTensor) != 0) {
    tile.box = Box::whole(shape);
  } else if (!get_dims(in, shape.rank(), tile.box.offset) ||
             !get_dims(in, shape.rank(), tile.box.length)) {
    return false;
  }
  if ((flags & kRowMajor) != 0) {
    tile.element_strides = canonical_row_major(tile.box.length);
    return true;
  }
  return get_dims(in, shape.rank(), tile.element_strides);
}

Result<void> get_tiles(ByteReader& in, LayoutParts& parts) {
  const uint64_t count = in.count(4);
  if (count > kMaxTiles) return corrupt(fmt::format("layout: {} tiles are too many", count));
  uint64_t tensor = 0;
  for (uint64_t i = 0; i < count; ++i) {
    if (!get_tile(in, parts, tensor, parts.tiles.emplace_back())) {
      return corrupt(fmt::format("layout: tile {} of {} is malformed", i, count));
    }
  }
  return {};
}

Result<void> get_fills(ByteReader& in, LayoutParts& parts) {
  const uint64_t count = in.count(3);
  if (count > kMaxTiles) return corrupt(fmt::format("layout: {} fills are too many", count));
  for (uint64_t i = 0; i < count; ++i) {
    Fill& fill = parts.fills.emplace_back();
    const uint64_t parameter = in.varint();
    fill.element_offset = get_int64(in);
    int rank = 0;
    if (parameter >= parts.parameters.size() || fill.element_offset < 0 || !get_rank(in, rank) ||
        !get_dims(in, rank, fill.length) || !get_dims(in, rank, fill.element_strides)) {
      return corrupt(fmt::format("layout: fill {} of {} is malformed", i, count));
    }
    fill.parameter = static_cast<uint32_t>(parameter);
  }
  return {};
}

Result<void> get_words(ByteReader& in, LayoutParts& parts) {
  parts.words.kind = in.text(kMaxKindBytes);
  const uint64_t count = in.count(4);  // tensor, entries, and two sizes
  uint64_t tensor = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t step = in.varint();
    const uint64_t entries = in.count(2);
    tensor += step;
    if (!in.ok() || step >= parts.tensors.size() || tensor >= parts.tensors.size() ||
        (i > 0 && step == 0) || entries > kMaxMetadataEntries) {
      return corrupt(fmt::format("layout: the metadata of tensor {} is malformed", tensor));
    }
    Metadata& metadata = parts.words.metadata[static_cast<uint32_t>(tensor)];
    for (uint64_t entry = 0; entry < entries; ++entry) {
      const std::string_view key = in.text(kMaxMetadataKeyBytes);
      metadata.emplace(key, in.text(kMaxMetadataValueBytes));
    }
  }
  return {};
}

Result<void> get_quantizations(ByteReader& in, LayoutParts& parts) {
  const uint64_t count = in.count(4);
  if (count == 0 || count > parts.tensors.size()) {
    return corrupt(
        fmt::format("layout: {} quantizations of {} tensors", count, parts.tensors.size()));
  }
  uint64_t tensor = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t step = in.varint();
    const uint64_t scales = in.varint();
    const int64_t block_rows = get_int64(in);
    const int64_t block_columns = get_int64(in);
    tensor += step;
    if (!in.ok() || step >= parts.tensors.size() || tensor >= parts.tensors.size() ||
        scales >= parts.tensors.size()) {
      return corrupt(fmt::format("layout: quantization {} of {} is malformed", i, count));
    }
    parts.quantizations.push_back({.tensor = static_cast<uint32_t>(tensor),
                                   .scales = static_cast<uint32_t>(scales),
                                   .block_rows = block_rows,
                                   .block_columns = block_columns});
  }
  return {};
}

// The version, which is at most `newest`.
Result<uint64_t> get_head(ByteReader& in, uint32_t magic, uint64_t newest, std::string_view what) {
  const auto found = in.fixed<uint32_t>();
  const uint64_t version = in.varint();
  if (!in.ok() || found != magic) {
    return corrupt(fmt::format("{}: expected magic {:08x}, found {:08x}", what, magic, found));
  }
  if (version < kVersion || version > newest) {
    return corrupt(
        fmt::format("{}: expected version {} to {}, found {}", what, kVersion, newest, version));
  }
  return version;
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

std::string encode_parts(std::span<const TensorSpec> tensors,
                         std::span<const ParameterSpec> parameters, std::span<const Tile> tiles,
                         std::span<const Fill> fills, std::span<const Quantization> quantizations,
                         const LayoutWords& words) {
  ByteWriter out;
  out.fixed(kLayoutMagic);
  const uint64_t with_words = words.empty() ? kVersion : kVersionWithWords;
  out.varint(quantizations.empty() ? with_words : kVersionWithQuantizations);
  size_t both = 0;  // names that are a tensor and a parameter
  for (size_t t = 0, p = 0; t < tensors.size() && p < parameters.size();) {
    const int order = tensors[t].name.compare(parameters[p].name);
    both += order == 0 ? 1 : 0;
    t += order <= 0 ? 1 : 0;
    p += order >= 0 ? 1 : 0;
  }
  out.varint(tensors.size() + parameters.size() - both);
  put_names(out, tensors, parameters);
  out.varint(tiles.size());
  uint32_t tensor = 0;
  for (const Tile& tile : tiles) {
    put_tile(out, tile, tensor, tensors[tile.tensor].shape);
    tensor = tile.tensor;
  }
  out.varint(fills.size());
  for (const Fill& fill : fills) {
    out.varint(fill.parameter);
    out.varint(as_unsigned(fill.element_offset));
    out.fixed(static_cast<uint8_t>(fill.length.rank()));
    put_dims(out, fill.length);
    put_dims(out, fill.element_strides);
  }
  if (!words.empty() || !quantizations.empty()) put_words(out, words);
  if (!quantizations.empty()) put_quantizations(out, quantizations);
  return std::move(out).take();
}

std::string encode(const Layout& layout) { return LayoutAssembly::encode(layout); }

std::string LayoutAssembly::encode(const Layout& layout) {
  return encode_parts(layout.tensors(), layout.parameters(), layout.tiles(), layout.fills(),
                      layout.quantizations(), layout.content_->words);
}

Result<Layout> decode_layout(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  LayoutParts parts;
  TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t version,
                             get_head(in, kLayoutMagic, kVersionWithQuantizations, "layout"));
  TRANSFUSE_RETURN_IF_ERROR(get_names(in, parts));
  TRANSFUSE_RETURN_IF_ERROR(get_tiles(in, parts));
  TRANSFUSE_RETURN_IF_ERROR(get_fills(in, parts));
  if (version >= kVersionWithWords) TRANSFUSE_RETURN_IF_ERROR(get_words(in, parts));
  if (version == kVersionWithQuantizations) {
    TRANSFUSE_RETURN_IF_ERROR(get_quantizations(in, parts));
  }
  if (!in.ok()) return corrupt(fmt::format("layout: {} bytes end too early", bytes.size()));
  std::string canonical;
  auto layout = LayoutAssembly::assemble(std::move(parts), &canonical);
  if (!layout) return corrupt("layout: " + std::move(layout).error().message);
  // One layout has one encoding: another one would have another digest at its sender.
  if (canonical != as_text(bytes)) {
    return corrupt(fmt::format("layout: {} bytes are not in canonical form, which has {}",
                               bytes.size(), canonical.size()));
  }
  return layout;
}

std::string encode(const Binding& binding) {
  ByteWriter out;
  out.fixed(kBindingMagic);
  out.varint(kVersion);
  out.fixed(binding.layout.high);
  out.fixed(binding.layout.low);
  out.varint(binding.places.size());
  for (const Place& place : binding.places) {
    out.varint(place.region);
    out.varint(place.offset_bytes);
  }
  return std::move(out).take();
}

Result<Binding> decode_binding(std::span<const std::byte> bytes) {
  ByteReader in(bytes);
  TRANSFUSE_RETURN_IF_ERROR(get_head(in, kBindingMagic, kVersion, "binding"));
  Binding binding;
  binding.layout.high = in.fixed<uint64_t>();
  binding.layout.low = in.fixed<uint64_t>();
  const uint64_t count = in.count(2);
  binding.places.reserve(count);
  for (uint64_t i = 0; i < count && in.ok(); ++i) {
    const uint64_t region = in.varint();
    const uint64_t offset_bytes = in.varint();
    binding.places.push_back(Place{.region = region, .offset_bytes = offset_bytes});
  }
  if (!in.ok() || in.remaining() != 0) {
    return corrupt(
        fmt::format("binding: {} bytes are malformed at byte {}", bytes.size(), in.position()));
  }
  if (encode(binding) != as_text(bytes)) {
    return corrupt(fmt::format("binding: {} bytes are not in canonical form", bytes.size()));
  }
  return binding;
}

}  // namespace transfuse
