// What a Plan answers about itself, and its key.
#include "transfuse/plan.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "plan/content.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

template <typename T>
uint64_t held_bytes(const std::vector<T>& values) {
  return values.capacity() * sizeof(T);
}

// Changes with what compile() makes of the same input, so that a stored plan is not mistaken.
constexpr uint32_t kCompilerVersion = 1;

}  // namespace

Plan::Plan(std::shared_ptr<const Content> content) : content_(std::move(content)) {}

std::span<const Chunk> Plan::chunks() const { return content_->chunks; }
std::span<const Run> Plan::runs() const { return content_->runs; }
std::span<const Holder> Plan::holders() const { return content_->holders; }
std::span<const Holder> Plan::holders_of(const Run& run) const {
  return holders().subspan(run.first_holder, run.holder_count);
}
const Strides3& Plan::pattern(uint32_t index) const {
  TRANSFUSE_CHECK(index < content_->patterns.size());
  return content_->patterns[index];
}
std::span<const ScaleRun> Plan::block_scales() const { return content_->block_scales; }
uint64_t Plan::target_bytes(const Run& run) const {
  const uint64_t elements = static_cast<uint64_t>(run.element_count()) *
                            dtype_size_bytes(target().parameters()[run.parameter].dtype);
  if (run.scales == 0) return elements;
  const ScaleRun& scales = block_scales()[run.scales - 1];
  return elements + scales.block_count(0, run.count[1]) * scales.block_count(1, run.count[2]) *
                        dtype_size_bytes(Dtype::kF32);
}
const Layout& Plan::target() const { return content_->target; }
std::span<const Layout> Plan::source_layouts() const { return content_->sources; }
const PlanOptions& Plan::options() const { return content_->options; }
const Digest& Plan::key() const { return content_->key; }
uint64_t Plan::size_bytes() const { return content_->size_bytes; }

uint64_t Plan::memory_bytes() const {
  return sizeof(Content) + held_bytes(content_->sources) + held_bytes(content_->chunks) +
         held_bytes(content_->runs) + held_bytes(content_->holders) +
         held_bytes(content_->patterns) + held_bytes(content_->block_scales);
}

Box Plan::box_of(const Run& run) const {
  const Dims& shape = content_->target.tensors()[run.tensor].shape;
  const Strides3& strides = pattern(run.index_pattern);
  Box box;
  int64_t outer = run.linear_index;  // the index within the dimensions from d on
  int64_t row_elements = shape.product();
  for (int d = 0; d < shape.rank(); ++d) {
    // How far the run reaches beyond its first element without leaving the index of dimension d-1.
    int64_t reach = 0;
    for (int level = 0; level < 3; ++level) {
      if (strides.level[level] % row_elements != 0 || d == 0) {
        reach += (int64_t{run.count[level]} - 1) * strides.level[level];
      }
    }
    outer %= row_elements;
    const bool wraps = outer + reach >= row_elements;
    row_elements /= shape[d];
    const int64_t first = wraps ? 0 : outer / row_elements;
    const int64_t last = wraps ? shape[d] - 1 : (outer + reach) / row_elements;
    box.offset.push_back(first);
    box.length.push_back(last - first + 1);
  }
  return box;
}

Digest plan_key(const Digest& target, std::span<const Digest> sources, const PlanOptions& options) {
  std::vector<Digest> distinct(sources.begin(), sources.end());
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  ByteWriter writer;
  writer.text("transfuse plan");
  writer.fixed(kCompilerVersion);
  writer.fixed(options.chunk_bytes);
  writer.fixed(target.high);
  writer.fixed(target.low);
  writer.fixed(uint64_t{distinct.size()});
  for (const Digest& digest : distinct) {
    writer.fixed(digest.high);
    writer.fixed(digest.low);
  }
  const XXH128_hash_t hash = XXH3_128bits(writer.bytes().data(), writer.bytes().size());
  return {hash.high64, hash.low64};
}

}  // namespace transfuse
