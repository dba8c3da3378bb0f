// Sound layouts from the small model, and what is broken in them on request.
#include "faults/weights.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "transfuse/model.h"

namespace transfuse::faults {
namespace {

constexpr uintptr_t kFixedAddress = uintptr_t{0x5f} << 40;  // nobody else maps there

// A second tensor of the same shape is said to lie where the first one does.
Result<Layout> with_overlap(const Layout& layout) {
  LayoutBuilder builder;
  for (const TensorSpec& tensor : layout.tensors()) builder.tensor(tensor);
  for (const ParameterSpec& parameter : layout.parameters()) builder.parameter(parameter);
  const Tile* first = nullptr;
  for (const Tile& tile : layout.tiles()) {
    const std::string& name = layout.tensors()[tile.tensor].name;
    const bool twin = name.ends_with("post_attention_layernorm.weight");
    if (name.ends_with("input_layernorm.weight")) first = &tile;
    const Tile& placed = twin && first != nullptr ? *first : tile;
    builder.tile(builder.tensor(layout.tensors()[tile.tensor]), tile.box,
                 builder.parameter(layout.parameters()[placed.parameter]), placed.element_offset,
                 tile.element_strides);
  }
  return builder.build();
}

// The last parameter has one element more than what lies in it.
Result<Layout> with_uncovered(const Layout& layout) {
  LayoutBuilder builder;
  for (const TensorSpec& tensor : layout.tensors()) builder.tensor(tensor);
  std::vector<uint32_t> parameters;
  for (const ParameterSpec& parameter : layout.parameters()) {
    ParameterSpec longer = parameter;
    longer.element_count += parameters.empty() ? 1 : 0;
    parameters.push_back(builder.parameter(longer));
  }
  for (const Tile& tile : layout.tiles()) {
    builder.tile(builder.tensor(layout.tensors()[tile.tensor]), tile.box,
                 parameters[tile.parameter], tile.element_offset, tile.element_strides);
  }
  return builder.build();
}

}  // namespace

Result<Layout> make_layout(const nlohmann::json& request) {
  ModelConfig model = testing::small_model();
  model.vocab_size = request.value("vocab_size", model.vocab_size);
  model.hidden_size = request.value("hidden_size", model.hidden_size);
  model.intermediate_size = request.value("intermediate_size", model.intermediate_size);
  model.num_hidden_layers = request.value("num_hidden_layers", model.num_hidden_layers);
  TRANSFUSE_ASSIGN_OR_RETURN(const ParallelSpec spec,
                             parse_parallel_spec(request.value("spec", "hf")));
  TRANSFUSE_ASSIGN_OR_RETURN(
      Layout layout, transfuse::make_layout(model, spec, request.value("rank", int64_t{0})));
  const std::string broken = request.value("broken", "");
  if (broken == "overlap") return with_overlap(layout);
  if (broken == "uncovered") return with_uncovered(layout);
  return layout;
}

Result<std::unique_ptr<Weights>> Weights::open(Transport& transport, Layout layout,
                                               const std::string& kind) {
  std::unique_ptr<Weights> weights(new Weights);
  if (kind == "heap") {
    weights->parameters_ = std::make_unique<testing::Parameters>(std::move(layout));
    return weights;
  }
  const uint64_t size_bytes = testing::Parameters::size_bytes(layout);
  std::span<std::byte> memory;
  if (kind == "arena") {
    TRANSFUSE_ASSIGN_OR_RETURN(weights->arena_, transport.allocate(size_bytes));
    memory = weights->arena_->bytes();
  } else {
    void* const base =
        ::mmap(reinterpret_cast<void*>(kFixedAddress), size_bytes, PROT_READ | PROT_WRITE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (base == MAP_FAILED) {
      return Error{ErrorCode::kResourceExhausted,
                   fmt::format("{} bytes at a fixed address: {}", size_bytes, strerror(errno))};
    }
    weights->mapped_ = memory = {static_cast<std::byte*>(base), size_bytes};
  }
  weights->parameters_ = std::make_unique<testing::Parameters>(std::move(layout), memory);
  return weights;
}

Weights::~Weights() {
  if (!mapped_.empty()) ::munmap(mapped_.data(), mapped_.size());
}

std::vector<const LocalRegion*> Weights::arenas() const {
  if (arena_ == nullptr) return {};
  return {arena_.get()};
}

}  // namespace transfuse::faults
