// Fingerprints of whole tensors, from a plan whose target is the catalog itself.
#include "session/revision.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "copy/copy.h"
#include "plan/copies.h"
#include "session/copy_threads.h"
#include "session/whole_layout.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"

namespace transfuse {

Result<Layout> whole_layout(std::span<const Layout> layouts) {
  LayoutBuilder builder;
  uint32_t tiled = 0;  // tensors; a new one has the next handle
  for (const Layout& layout : layouts) {
    for (uint32_t i = 0; i < layout.tensors().size(); ++i) {
      if (layout.tiles_of(i).empty()) continue;
      TensorSpec tensor = layout.tensors()[i];
      tensor.dtype = layout.parameters()[layout.tiles_of(i).front().parameter].dtype;
      const uint32_t parameter = builder.parameter(
          {.name = tensor.name, .dtype = tensor.dtype, .element_count = tensor.shape.product()});
      const uint32_t handle = builder.tensor(tensor);
      if (handle < tiled) continue;
      builder.tile(handle, Box::whole(tensor.shape), parameter, 0);
      ++tiled;
    }
  }
  return builder.build();
}

Result<std::unique_ptr<RevisionSum>> RevisionSum::open(const Layout& layout, uint32_t threads) {
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout whole, whole_layout({&layout, 1}));
  auto plan = compile(whole, {&layout, 1});
  if (!plan) {
    return Error{plan.error().code,
                 fmt::format("a revision is of whole tensors, and this source holds parts: {}",
                             plan.error().message)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(auto pool, CopyThreads::open(std::max(1U, threads)));
  return std::unique_ptr<RevisionSum>(
      new RevisionSum(CopyTable(std::move(*plan)), std::move(pool)));
}

Digest RevisionSum::of(const std::function<const std::byte*(uint32_t)>& data) {
  const Plan& plan = copies_.plan();
  std::vector<uint64_t> sums(plan.runs().size());  // apart, so that no thread waits for another
  threads_->run(plan.chunks().size(), [&](size_t i) {
    const Chunk& chunk = plan.chunks()[i];
    for (uint32_t run = chunk.first_run; run < chunk.first_run + chunk.run_count; ++run) {
      const Holder& holder = plan.holders_of(plan.runs()[run]).front();
      sums[run] = copies_.sum(plan.runs()[run], holder, data);
    }
  });
  std::vector<uint64_t> tensors(plan.target().tensors().size(), 0);
  for (size_t run = 0; run < sums.size(); ++run) tensors[plan.runs()[run].tensor] += sums[run];
  return content_revision(plan.target().tensors(), tensors);
}

Result<Digest> revision_of(const Layout& layout, std::span<const ParameterMemory> memory,
                           uint32_t threads) {
  std::vector<const std::byte*> data(layout.parameters().size(), nullptr);
  for (const ParameterMemory& each : memory) {
    const auto parameter = layout.find_parameter(each.name);
    if (!parameter) {
      return Error{ErrorCode::kInvalidArgument,
                   fmt::format("parameter '{}' is not in the layout", each.name)};
    }
    const ParameterSpec& spec = layout.parameters()[*parameter];
    const uint64_t expected =
        static_cast<uint64_t>(spec.element_count) * dtype_size_bytes(spec.dtype);
    if (each.size_bytes != expected) {
      return Error{ErrorCode::kLayoutMismatch,
                   fmt::format("parameter '{}' has {} bytes, expected {}", each.name,
                               each.size_bytes, expected)};
    }
    data[*parameter] = each.data;
  }
  const auto missing = std::ranges::find(data, nullptr);
  if (missing != data.end()) {
    const std::string& name = layout.parameters()[static_cast<size_t>(missing - data.begin())].name;
    return Error{ErrorCode::kInvalidArgument, fmt::format("parameter '{}' is missing", name)};
  }
  if (threads == 0) threads = usable_core_count();
  TRANSFUSE_ASSIGN_OR_RETURN(auto sum, RevisionSum::open(layout, threads));
  return sum->of([&](uint32_t parameter) { return data[parameter]; });
}

}  // namespace transfuse
