// Where the bytes of a model's tensors lie in one process: catalog, box, tile, layout, digest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfuse/digest.h"        // IWYU pragma: export
#include "transfuse/metadata.h"      // IWYU pragma: export
#include "transfuse/quantization.h"  // IWYU pragma: export
#include "transfuse/result.h"

namespace transfuse {

enum class Dtype : uint8_t { kF32, kF16, kBF16, kF8E4M3, kF8E5M2, kI8, kU8, kI32, kI64 };
inline constexpr int kDtypeCount = 9;
uint32_t dtype_size_bytes(Dtype dtype);
std::string_view dtype_name(Dtype dtype);  // "f32", "bf16", "f8e4m3", ...
Result<Dtype> parse_dtype(std::string_view name);
// True if a refit may read `source` and write `target`: equal, f32 -> bf16/f16 (round to nearest
// even), or bf16/f16 -> f32 (exact).
bool castable(Dtype source, Dtype target);

// Up to kMaxRank numbers, one per dimension. A value type without allocation.
inline constexpr int kMaxRank = 8;
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values);
  explicit Dims(
      std::span<const int64_t> values);  // aborts beyond kMaxRank: check outside data first
  int rank() const { return rank_; }
  int64_t& operator[](int i) { return values_[static_cast<size_t>(i)]; }
  int64_t operator[](int i) const { return values_[static_cast<size_t>(i)]; }
  std::span<const int64_t> values() const { return {values_.data(), static_cast<size_t>(rank_)}; }
  void push_back(int64_t value);
  int64_t product() const;  // 1 for rank 0; INT64_MAX where it does not fit
  bool operator==(const Dims& other) const;
  std::string to_string() const;  // "[4, 6]"

 private:
  std::array<int64_t, kMaxRank> values_{};
  int rank_ = 0;
};
Dims row_major_strides(const Dims& shape);  // elements

// Half-open: dimension d covers [offset[d], offset[d] + length[d]). Empty if any length is 0.
struct Box {
  Dims offset;
  Dims length;
  static Box whole(const Dims& shape);
  int64_t element_count() const { return length.product(); }
  bool operator==(const Box&) const = default;
  std::string to_string() const;  // "[0:4, 2:6]"
};
// nullopt where they share no element. Both must have one rank.
std::optional<Box> intersect(const Box& a, const Box& b);

// A tensor as the published checkpoint names it.
struct TensorSpec {
  std::string name;
  Dtype dtype = Dtype::kBF16;  // as published; what is moved has the dtype of the parameters
  Dims shape;
  bool operator==(const TensorSpec&) const = default;
};
using Catalog = std::vector<TensorSpec>;

// A parameter as this process holds it: a span of `element_count` elements of storage (views and
// padding included).
struct ParameterSpec {
  std::string name;
  Dtype dtype = Dtype::kBF16;
  int64_t element_count = 0;
  bool operator==(const ParameterSpec&) const = default;
};

// Element i of `box` (i relative to box.offset) of catalog tensor `tensor` lies at
// element_offset + sum(i[d] * element_strides[d]) of `parameter`. Strides are in elements and at
// least 1 where a length exceeds 1.
struct Tile {
  uint32_t tensor = 0;     // index into Layout::tensors()
  uint32_t parameter = 0;  // index into Layout::parameters()
  Box box;
  int64_t element_offset = 0;
  Dims element_strides;
  bool operator==(const Tile&) const = default;
};

// Elements of a parameter that no catalog tensor covers and that hold zeros (padded vocabulary).
struct Fill {
  uint32_t parameter = 0;
  int64_t element_offset = 0;
  Dims length;
  Dims element_strides;
  bool operator==(const Fill&) const = default;
};

struct LayoutParts;

// Immutable and cheap to copy (shared content: layouts are passed around by value between planner,
// sessions and codec). Canonical: tensors and parameters sorted by name, tiles by (tensor, box,
// parameter, offset), so that equal layouts have equal digests in every process. Holds no
// addresses. Safe to use from any thread.
class Layout {
 public:
  Layout();  // empty
  std::span<const TensorSpec> tensors() const;
  std::span<const ParameterSpec> parameters() const;
  std::span<const Tile> tiles() const;  // sorted; the tiles of one tensor are contiguous
  std::span<const Fill> fills() const;
  std::span<const Tile> tiles_of(uint32_t tensor) const;
  std::span<const Quantization> quantizations() const;  // by tensor
  std::optional<Quantization> quantization_of(uint32_t tensor) const;
  std::optional<uint32_t> find_tensor(std::string_view name) const;
  std::optional<uint32_t> find_parameter(std::string_view name) const;
  const Digest& digest() const;
  // Both are part of what is digested, so they are for what lasts as long as the layout; what
  // changes from version to version belongs to the offer of a version.
  std::string_view kind() const;  // see metadata.h; "": not stated
  const Metadata& metadata_of(uint32_t tensor) const;
  Result<Layout> with_kind(std::string_view kind) const;
  // The same with these in place of its own; errors as of LayoutBuilder::build().
  Result<Layout> with_quantizations(std::span<const Quantization> quantizations) const;
  uint64_t tile_bytes() const;       // bytes that tiles cover, in the dtypes of the parameters
  uint64_t parameter_bytes() const;  // bytes of all parameters

 private:
  friend class LayoutAssembly;
  struct Content;
  explicit Layout(std::shared_ptr<const Content> content);
  LayoutParts parts() const;  // a copy
  std::shared_ptr<const Content>
      content_;  // shared: a layout is immutable and copied between components
};

// Collects a layout in any order. Errors are found in build() and name the tensor or parameter.
// Used from one thread.
class LayoutBuilder {
 public:
  LayoutBuilder();
  ~LayoutBuilder();
  LayoutBuilder(LayoutBuilder&&) noexcept;
  LayoutBuilder& operator=(LayoutBuilder&&) noexcept;

  // Adding a tensor or parameter twice with equal contents returns the first handle; with other
  // contents build() fails.
  uint32_t tensor(const TensorSpec& spec);
  uint32_t parameter(const ParameterSpec& spec);
  // Strides default to row-major over the box (the whole parameter is the box, or a run of its
  // leading rows).
  void tile(uint32_t tensor, const Box& box, uint32_t parameter, int64_t element_offset);
  void tile(uint32_t tensor, const Box& box, uint32_t parameter, int64_t element_offset,
            const Dims& element_strides);
  void fill(uint32_t parameter, int64_t element_offset, const Dims& length,
            const Dims& element_strides);

  // Says that `scales` holds the scales of `tensor`; a block that is larger than the tensor is the
  // tensor. A target that says so can be filled from sources that hold the tensor in f32, bf16 or
  // f16 and know nothing of the scales; a source that says so can fill targets in those dtypes.
  void quantization(uint32_t tensor, uint32_t scales, int64_t block_rows, int64_t block_columns);

  void kind(std::string_view kind);
  void metadata(uint32_t tensor, const Metadata& metadata);  // replaces what was said before

  // Empty tiles are dropped; the stride of a dimension of length 1 means nothing and becomes 1.
  // Fails with kInvalidArgument (bad box, stride, name) or kLayoutMismatch (a tile reaches beyond
  // its parameter). Leaves the builder empty.
  Result<Layout> build();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The wire form: versioned, bounded, each name once. decode() accepts any bytes and fails with
// kCorrupt.
std::string encode(const Layout& layout);
Result<Layout> decode_layout(std::span<const std::byte> bytes);

// A layout joined to memory: parameter i (of Layout::parameters()) starts at offset_bytes of a
// registered region.
struct Place {
  uint64_t region = 0;
  uint64_t offset_bytes = 0;
  bool operator==(const Place&) const = default;
};
struct Binding {
  Digest layout;
  std::vector<Place> places;  // one per parameter, in the layout's canonical order
};
std::string encode(const Binding& binding);
Result<Binding> decode_binding(std::span<const std::byte> bytes);

}  // namespace transfuse
