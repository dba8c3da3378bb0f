// Layout and LayoutBuilder: an immutable description and the collector that makes one.
#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "layout/assembly.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

template <typename Spec>
std::optional<uint32_t> find_by_name(const std::vector<Spec>& specs, std::string_view name) {
  const auto at = std::lower_bound(
      specs.begin(), specs.end(), name,
      [](const Spec& spec, std::string_view wanted) { return spec.name < wanted; });
  if (at == specs.end() || at->name != name) return std::nullopt;
  return static_cast<uint32_t>(at - specs.begin());
}

std::string describe(const TensorSpec& tensor) {
  return fmt::format("tensor {} ({} {})", tensor.name, dtype_name(tensor.dtype),
                     tensor.shape.to_string());
}

std::string describe(const ParameterSpec& parameter) {
  return fmt::format("parameter {} ({}, {} elements)", parameter.name, dtype_name(parameter.dtype),
                     parameter.element_count);
}

// Specs in order of arrival, found by name without a second copy of the names: an open-addressing
// table of handles, at most half full.
template <typename Spec>
class SpecTable {
 public:
  explicit SpecTable(std::vector<Spec>& specs) : specs_(&specs), slots_(16) {}

  // The handle; `conflict` is set where the name is known with other contents.
  uint32_t add(const Spec& spec, std::optional<Error>& conflict) {
    const uint64_t hash = XXH3_64bits(spec.name.data(), spec.name.size());
    const auto check = static_cast<uint32_t>(hash >> 32);
    size_t at = hash & (slots_.size() - 1);
    for (; slots_[at].used; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].check != check) continue;
      const Spec& known = (*specs_)[slots_[at].handle];
      if (known.name != spec.name) continue;
      if (!(known == spec) && !conflict) {
        conflict = Error{ErrorCode::kInvalidArgument,
                         describe(known) + " was added again as " + describe(spec)};
      }
      return slots_[at].handle;
    }
    const auto handle = static_cast<uint32_t>(specs_->size());
    specs_->push_back(spec);
    slots_[at] = Slot{.handle = handle, .check = check, .used = true};
    if (specs_->size() * 2 > slots_.size()) grow();
    return handle;
  }

 private:
  struct Slot {
    uint32_t handle = 0;
    uint32_t check = 0;  // upper half of the hash: most other names are told apart without a look
    bool used = false;
  };

  void grow() {
    slots_.assign(slots_.size() * 2, Slot{});
    for (uint32_t handle = 0; handle < specs_->size(); ++handle) {
      const std::string& name = (*specs_)[handle].name;
      const uint64_t hash = XXH3_64bits(name.data(), name.size());
      size_t at = hash & (slots_.size() - 1);
      while (slots_[at].used) at = (at + 1) & (slots_.size() - 1);
      slots_[at] = Slot{.handle = handle, .check = static_cast<uint32_t>(hash >> 32), .used = true};
    }
  }

  std::vector<Spec>* specs_;
  std::vector<Slot> slots_;
};

}  // namespace

Layout::Layout() : content_() {
  static const Layout empty = LayoutAssembly::assemble({}).value();
  content_ = empty.content_;
}

Layout::Layout(std::shared_ptr<const Content> content) : content_(std::move(content)) {}

std::span<const TensorSpec> Layout::tensors() const { return content_->tensors; }
std::span<const ParameterSpec> Layout::parameters() const { return content_->parameters; }
std::span<const Tile> Layout::tiles() const { return content_->tiles; }
std::span<const Fill> Layout::fills() const { return content_->fills; }
const Digest& Layout::digest() const { return content_->digest; }
std::string_view Layout::kind() const { return content_->words.kind; }

const Metadata& Layout::metadata_of(uint32_t tensor) const {
  static const Metadata none;
  const auto found = content_->words.metadata.find(tensor);
  return found == content_->words.metadata.end() ? none : found->second;
}

LayoutParts Layout::parts() const {
  return {.tensors = content_->tensors,
          .parameters = content_->parameters,
          .tiles = content_->tiles,
          .fills = content_->fills,
          .quantizations = content_->quantizations,
          .words = content_->words};
}

Result<Layout> Layout::with_kind(std::string_view kind) const {
  LayoutParts changed = parts();
  changed.words.kind = kind;
  return LayoutAssembly::assemble(std::move(changed));
}

Result<Layout> Layout::with_quantizations(std::span<const Quantization> quantizations) const {
  LayoutParts changed = parts();
  changed.quantizations.assign(quantizations.begin(), quantizations.end());
  return LayoutAssembly::assemble(std::move(changed));
}

uint64_t Layout::tile_bytes() const { return content_->tile_bytes; }
uint64_t Layout::parameter_bytes() const { return content_->parameter_bytes; }

std::span<const Tile> Layout::tiles_of(uint32_t tensor) const {
  TRANSFUSE_CHECK(tensor < content_->tensors.size());
  const uint32_t first = content_->first_tile[tensor];
  return tiles().subspan(first, content_->first_tile[tensor + 1] - first);
}

std::span<const Quantization> Layout::quantizations() const { return content_->quantizations; }

std::optional<Quantization> Layout::quantization_of(uint32_t tensor) const {
  const auto found =
      std::ranges::lower_bound(content_->quantizations, tensor, {}, &Quantization::tensor);
  if (found == content_->quantizations.end() || found->tensor != tensor) return std::nullopt;
  return *found;
}

std::optional<uint32_t> Layout::find_tensor(std::string_view name) const {
  return find_by_name(content_->tensors, name);
}

std::optional<uint32_t> Layout::find_parameter(std::string_view name) const {
  return find_by_name(content_->parameters, name);
}

struct LayoutBuilder::State {
  LayoutParts parts;
  SpecTable<TensorSpec> tensors{parts.tensors};
  SpecTable<ParameterSpec> parameters{parts.parameters};
  std::optional<Error> conflict;
};

LayoutBuilder::LayoutBuilder() : state_(std::make_unique<State>()) {}
LayoutBuilder::~LayoutBuilder() = default;
LayoutBuilder::LayoutBuilder(LayoutBuilder&&) noexcept = default;
LayoutBuilder& LayoutBuilder::operator=(LayoutBuilder&&) noexcept = default;

uint32_t LayoutBuilder::tensor(const TensorSpec& spec) {
  return state_->tensors.add(spec, state_->conflict);
}

uint32_t LayoutBuilder::parameter(const ParameterSpec& spec) {
  return state_->parameters.add(spec, state_->conflict);
}

void LayoutBuilder::tile(uint32_t tensor, const Box& box, uint32_t parameter,
                         int64_t element_offset) {
  tile(tensor, box, parameter, element_offset, row_major_strides(box.length));
}

void LayoutBuilder::tile(uint32_t tensor, const Box& box, uint32_t parameter,
                         int64_t element_offset, const Dims& element_strides) {
  state_->parts.tiles.push_back(Tile{.tensor = tensor,
                                     .parameter = parameter,
                                     .box = box,
                                     .element_offset = element_offset,
                                     .element_strides = element_strides});
}

void LayoutBuilder::fill(uint32_t parameter, int64_t element_offset, const Dims& length,
                         const Dims& element_strides) {
  state_->parts.fills.push_back(Fill{.parameter = parameter,
                                     .element_offset = element_offset,
                                     .length = length,
                                     .element_strides = element_strides});
}

void LayoutBuilder::quantization(uint32_t tensor, uint32_t scales, int64_t block_rows,
                                 int64_t block_columns) {
  state_->parts.quantizations.push_back(Quantization{.tensor = tensor,
                                                     .scales = scales,
                                                     .block_rows = block_rows,
                                                     .block_columns = block_columns});
}

void LayoutBuilder::kind(std::string_view kind) { state_->parts.words.kind = kind; }

void LayoutBuilder::metadata(uint32_t tensor, const Metadata& metadata) {
  state_->parts.words.metadata[tensor] = metadata;
}

Result<Layout> LayoutBuilder::build() {
  const std::unique_ptr<State> state = std::exchange(state_, std::make_unique<State>());
  if (state->conflict) return *state->conflict;
  return LayoutAssembly::assemble(std::move(state->parts));
}

}  // namespace transfuse
