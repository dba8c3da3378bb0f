// The slow truth for tests, and tests of the truth itself on worlds small enough to check by hand.
#include "plan/oracle.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {
namespace {

// Calls visit(index) for every index vector below `lengths`, last dimension fastest.
template <typename Visit>
void for_each_index(const Dims& lengths, Visit&& visit) {
  std::vector<int64_t> index(static_cast<size_t>(lengths.rank()), 0);
  for (int64_t length : lengths.values()) {
    if (length == 0) return;
  }
  while (true) {
    visit(index);
    size_t d = index.size();
    while (d > 0 && index[d - 1] + 1 == lengths[static_cast<int>(d - 1)]) index[--d] = 0;
    if (d == 0) return;
    ++index[d - 1];
  }
}

int64_t place_of(int64_t offset, const Dims& strides, const std::vector<int64_t>& index) {
  for (size_t d = 0; d < index.size(); ++d) offset += index[d] * strides[static_cast<int>(d)];
  return offset;
}

int64_t linear_of(const Dims& shape, const Box& box, const std::vector<int64_t>& index) {
  int64_t linear = 0;
  for (size_t d = 0; d < index.size(); ++d) {
    const int dim = static_cast<int>(d);
    linear = linear * shape[dim] + box.offset[dim] + index[d];
  }
  return linear;
}

std::string describe(const CatalogElement& element) {
  return element.first + "#" + std::to_string(element.second);
}

// All elements of a run: (i0, i1, i2) flattened, with their places.
template <typename Visit>
void for_each_element(const Plan& plan, const Run& run, const Holder& holder, Visit&& visit) {
  const Strides3 target = plan.pattern(run.target_pattern);
  const Strides3 index = plan.pattern(run.index_pattern);
  const Strides3 source = plan.pattern(holder.source_pattern);
  const auto place = [](int64_t start, const Strides3& s, int64_t a, int64_t b, int64_t c) {
    return start + a * s.level[0] + b * s.level[1] + c * s.level[2];
  };
  for (int64_t a = 0; a < run.count[0]; ++a) {
    for (int64_t b = 0; b < run.count[1]; ++b) {
      for (int64_t c = 0; c < run.count[2]; ++c) {
        visit(place(run.target_offset, target, a, b, c), place(run.linear_index, index, a, b, c),
              place(holder.source_offset, source, a, b, c));
      }
    }
  }
}

// True if grouping the dimensions of `fine` from the first on gives `coarse`; those of length 1 do
// not count.
bool groups_into(std::vector<int64_t> fine, std::vector<int64_t> coarse) {
  std::erase(fine, 1);
  std::erase(coarse, 1);
  while (!coarse.empty()) {
    if (fine.empty() || coarse.front() % fine.front() != 0) return false;
    coarse.front() /= fine.front();
    fine.erase(fine.begin());
    if (coarse.front() == 1) coarse.erase(coarse.begin());
  }
  return fine.empty();
}

// True if one of the shapes splits dimensions of all others.
bool one_splits_all(const std::vector<Dims>& shapes) {
  const auto list = [](const Dims& shape) {
    return std::vector<int64_t>(shape.values().begin(), shape.values().end());
  };
  return std::ranges::any_of(shapes, [&](const Dims& fine) {
    return std::ranges::all_of(
        shapes, [&](const Dims& coarse) { return groups_into(list(fine), list(coarse)); });
  });
}

uint64_t cast_bits(uint64_t bits, Dtype source, Dtype target) {
  return source == Dtype::kF32 && target == Dtype::kBF16 ? bits >> 16 : bits;
}

}  // namespace

Oracle::Oracle(const Layout& target, std::span<const Layout> sources) {
  std::map<CatalogElement, std::set<std::pair<Digest, Dtype>>> dtypes;
  std::map<std::string, std::vector<Dims>> shapes;
  for (const TensorSpec& tensor : target.tensors()) shapes[tensor.name] = {tensor.shape};
  for (const Layout& source : sources) {
    for (const TensorSpec& tensor : source.tensors()) {
      known_tensors.insert(tensor.name);
      const auto mine = shapes.find(tensor.name);
      if (mine != shapes.end()) mine->second.push_back(tensor.shape);
    }
    for (const Tile& tile : source.tiles()) {
      const TensorSpec& tensor = source.tensors()[tile.tensor];
      for_each_index(tile.box.length, [&](const std::vector<int64_t>& index) {
        const CatalogElement element{tensor.name, linear_of(tensor.shape, tile.box, index)};
        holders[element].insert(source.digest());
        dtypes[element].insert({source.digest(), source.parameters()[tile.parameter].dtype});
      });
    }
  }
  for (const auto& [name, all] : shapes) {
    if (!one_splits_all(all)) tensors_of_other_shape.insert(name);
  }
  for (const ParameterSpec& parameter : target.parameters()) {
    parameters[parameter.name].resize(static_cast<size_t>(parameter.element_count));
  }
  for (const Tile& tile : target.tiles()) {
    const TensorSpec& tensor = target.tensors()[tile.tensor];
    const ParameterSpec& parameter = target.parameters()[tile.parameter];
    for_each_index(tile.box.length, [&](const std::vector<int64_t>& index) {
      const CatalogElement element{tensor.name, linear_of(tensor.shape, tile.box, index)};
      const int64_t place = place_of(tile.element_offset, tile.element_strides, index);
      parameters[parameter.name].at(static_cast<size_t>(place)).tiles.push_back(element);
      for (const auto& [digest, dtype] : dtypes[element]) {
        const bool cast = dtype == parameter.dtype ||
                          (dtype == Dtype::kF32 &&
                           (parameter.dtype == Dtype::kBF16 || parameter.dtype == Dtype::kF16));
        if (!cast) dtype_conflicts.insert({parameter.name, element});
      }
    });
  }
  for (const Fill& fill : target.fills()) {
    const ParameterSpec& parameter = target.parameters()[fill.parameter];
    for_each_index(fill.length, [&](const std::vector<int64_t>& index) {
      const int64_t place = place_of(fill.element_offset, fill.element_strides, index);
      ++parameters[parameter.name].at(static_cast<size_t>(place)).fills;
    });
  }
}

bool Oracle::consistent() const {
  for (const auto& [name, elements] : parameters) {
    for (const TargetElement& element : elements) {
      if (element.tiles.size() + static_cast<size_t>(element.fills) != 1) return false;
      for (const CatalogElement& wanted : element.tiles) {
        if (!holders.contains(wanted) || holders.at(wanted).empty()) return false;
        if (tensors_of_other_shape.contains(wanted.first)) return false;
        if (dtype_conflicts.contains({name, wanted})) return false;
      }
    }
  }
  return true;
}

uint64_t element_bits(const CatalogElement& element, Dtype dtype) {
  uint64_t hash = 1469598103934665603u;  // FNV-1a
  const auto mix = [&hash](uint64_t byte) { hash = (hash ^ byte) * 1099511628211u; };
  for (const char c : element.first) mix(static_cast<unsigned char>(c));
  for (int i = 0; i < 8; ++i) mix((static_cast<uint64_t>(element.second) >> (8 * i)) & 0xFF);
  hash ^= hash >> 32;
  if (dtype == Dtype::kF32) return (hash & 0xFFFF) << 16;
  const uint32_t bytes = dtype_size_bytes(dtype);
  return bytes == 8 ? hash : hash & ((uint64_t{1} << (8 * bytes)) - 1);
}

ByteWorld::ByteWorld(const Layout& layout) : layout_(layout) {
  for (const ParameterSpec& parameter : layout.parameters()) {
    parameters_.emplace_back(
        static_cast<size_t>(parameter.element_count) * dtype_size_bytes(parameter.dtype),
        std::byte{0xEE});
  }
}

void ByteWorld::write_tiles() {
  for (const Tile& tile : layout_.tiles()) {
    const TensorSpec& tensor = layout_.tensors()[tile.tensor];
    for_each_index(tile.box.length, [&](const std::vector<int64_t>& index) {
      store(tile.parameter, place_of(tile.element_offset, tile.element_strides, index),
            element_bits({tensor.name, linear_of(tensor.shape, tile.box, index)},
                         layout_.parameters()[tile.parameter].dtype));
    });
  }
}

void ByteWorld::write_fills() {
  for (const Fill& fill : layout_.fills()) {
    for_each_index(fill.length, [&](const std::vector<int64_t>& index) {
      store(fill.parameter, place_of(fill.element_offset, fill.element_strides, index), 0);
    });
  }
}

uint64_t ByteWorld::load(uint32_t parameter, int64_t element) const {
  const size_t bytes = dtype_size_bytes(layout_.parameters()[parameter].dtype);
  const size_t at = static_cast<size_t>(element) * bytes;
  TRANSFUSE_CHECK(element >= 0 && at + bytes <= parameters_[parameter].size());
  uint64_t bits = 0;
  std::memcpy(&bits, parameters_[parameter].data() + at, bytes);
  return bits;
}

void ByteWorld::store(uint32_t parameter, int64_t element, uint64_t bits) {
  const size_t bytes = dtype_size_bytes(layout_.parameters()[parameter].dtype);
  const size_t at = static_cast<size_t>(element) * bytes;
  TRANSFUSE_CHECK(element >= 0 && at + bytes <= parameters_[parameter].size());
  std::memcpy(parameters_[parameter].data() + at, &bits, bytes);
}

namespace {

// Every run's holders, places and bytes; `writes[parameter][element]` counts.
void judge_runs(const Plan& plan, const Oracle& oracle, std::vector<std::vector<int>>& writes,
                std::vector<std::string>& failures) {
  const Layout& target = plan.target();
  std::vector<ByteWorld> worlds;
  for (const Layout& source : plan.source_layouts()) {
    worlds.emplace_back(source).write_tiles();
  }
  for (const Run& run : plan.runs()) {
    const std::string& name = target.tensors()[run.tensor].name;
    const ParameterSpec& parameter = target.parameters()[run.parameter];
    const auto& truth = oracle.parameters.at(parameter.name);
    const Box box = plan.box_of(run);
    std::set<Digest> listed;
    for (const Holder& holder : plan.holders_of(run)) {
      const Layout& source = plan.source_layouts()[holder.source_layout];
      const Dtype held = source.parameters()[holder.parameter].dtype;
      if (!listed.insert(source.digest()).second) failures.push_back("a layout listed twice");
      const bool first = listed.size() == 1;
      for_each_element(plan, run, holder, [&](int64_t place, int64_t linear, int64_t from) {
        const CatalogElement element{name, linear};
        const auto& expected = truth.at(static_cast<size_t>(place));
        if (expected.tiles.size() != 1 || expected.tiles[0] != element) {
          failures.push_back(parameter.name + "[" + std::to_string(place) + "]: run claims " +
                             describe(element));
        }
        const uint64_t bits = worlds[holder.source_layout].load(holder.parameter, from);
        if (cast_bits(bits, held, parameter.dtype) != element_bits(element, parameter.dtype)) {
          failures.push_back(parameter.name + "[" + std::to_string(place) + "]: wrong bytes for " +
                             describe(element));
        }
        int64_t rest = linear;
        for (int d = box.offset.rank() - 1; d >= 0; --d) {
          const int64_t size = target.tensors()[run.tensor].shape[d];
          const int64_t at = rest % size;
          rest /= size;
          if (at < box.offset[d] || at >= box.offset[d] + box.length[d]) {
            failures.push_back(describe(element) + " outside " + box.to_string());
          }
        }
        if (first) ++writes[run.parameter][static_cast<size_t>(place)];
      });
    }
    const Holder& any = plan.holders_of(run)[0];
    for_each_element(plan, run, any, [&](int64_t, int64_t linear, int64_t) {
      if (oracle.holders.at({name, linear}) != listed) {
        failures.push_back(describe({name, linear}) + ": holders differ from the truth");
      }
    });
  }
}

void judge_chunks(const Plan& plan, std::vector<std::string>& failures) {
  uint32_t next = 0;
  uint64_t total = 0;
  for (const Chunk& chunk : plan.chunks()) {
    if (chunk.first_run != next || chunk.run_count == 0)
      failures.push_back("chunks leave runs out");
    next = chunk.first_run + chunk.run_count;
    uint64_t bytes = 0;
    uint64_t largest_element = 0;
    for (const Run& run : plan.runs().subspan(chunk.first_run, chunk.run_count)) {
      const uint64_t element = dtype_size_bytes(plan.target().parameters()[run.parameter].dtype);
      bytes += static_cast<uint64_t>(run.element_count()) * element;
      largest_element = std::max(largest_element, element);
    }
    if (bytes != chunk.size_bytes) failures.push_back("a chunk's size differs from its runs");
    if (bytes > std::max(plan.options().chunk_bytes, largest_element)) {
      failures.push_back("a chunk of " + std::to_string(bytes) + " bytes");
    }
    total += bytes;
  }
  if (next != plan.runs().size()) failures.push_back("runs after the last chunk");
  if (total != plan.size_bytes()) failures.push_back("size_bytes differs from the chunks");
}

}  // namespace

std::vector<std::string> judge(const Plan& plan, const Oracle& oracle) {
  std::vector<std::string> failures;
  const Layout& target = plan.target();
  std::vector<std::vector<int>> writes;
  for (const ParameterSpec& parameter : target.parameters()) {
    writes.emplace_back(static_cast<size_t>(parameter.element_count), 0);
  }
  judge_runs(plan, oracle, writes, failures);
  for (size_t p = 0; p < writes.size(); ++p) {
    const std::string& name = target.parameters()[p].name;
    const auto& truth = oracle.parameters.at(name);
    for (size_t e = 0; e < writes[p].size(); ++e) {
      if (writes[p][e] == static_cast<int>(truth[e].tiles.size())) continue;
      failures.push_back(name + "[" + std::to_string(e) + "] written " +
                         std::to_string(writes[p][e]) + " times");
    }
  }
  judge_chunks(plan, failures);
  return failures;
}

std::vector<std::string> judge(const std::vector<Finding>& findings, const Layout& target,
                               const Oracle& oracle) {
  std::vector<std::string> failures;
  std::set<CatalogElement> gaps;
  std::set<std::pair<std::string, int64_t>> uncovered;
  std::set<std::pair<std::string, CatalogElement>> overlapping;
  std::set<std::pair<std::string, CatalogElement>> dtypes;
  std::set<std::string> unknown;
  std::set<std::string> shapes;
  bool fill_overlap = false;
  for (const Finding& finding : findings) {
    if (finding.reason.empty()) failures.push_back("a finding without a reason");
    if (finding.kind == FindingKind::kUnknownTensor) unknown.insert(finding.tensor);
    if (finding.kind == FindingKind::kShape) shapes.insert(finding.tensor);
    if (finding.tensor.empty()) fill_overlap |= finding.kind == FindingKind::kOverlap;
    const auto tensor = target.find_tensor(finding.tensor);
    for_each_index(finding.box.length, [&](const std::vector<int64_t>& index) {
      if (finding.kind == FindingKind::kUncovered) {
        uncovered.insert({finding.parameter, finding.box.offset[0] + index[0]});
      }
      if (!tensor) return;
      const Dims& shape = target.tensors()[*tensor].shape;
      const CatalogElement element{finding.tensor, linear_of(shape, finding.box, index)};
      if (finding.kind == FindingKind::kGap) gaps.insert(element);
      if (finding.kind == FindingKind::kOverlap) overlapping.insert({finding.parameter, element});
      if (finding.kind == FindingKind::kDtype) dtypes.insert({finding.parameter, element});
    });
  }
  std::set<CatalogElement> true_gaps;
  std::set<std::pair<std::string, int64_t>> true_uncovered;
  std::set<std::pair<std::string, CatalogElement>> true_dtypes;
  for (const auto& [name, elements] : oracle.parameters) {
    for (size_t e = 0; e < elements.size(); ++e) {
      const TargetElement& element = elements[e];
      if (element.tiles.empty() && element.fills == 0) {
        true_uncovered.insert({name, static_cast<int64_t>(e)});
      }
      bool overlap_named = fill_overlap;
      for (const CatalogElement& wanted : element.tiles) {
        overlap_named |= overlapping.contains({name, wanted});
        if (!oracle.known_tensors.contains(wanted.first)) {
          if (!unknown.contains(wanted.first)) failures.push_back("unknown: " + wanted.first);
        } else if (oracle.tensors_of_other_shape.contains(wanted.first)) {
          if (!shapes.contains(wanted.first)) failures.push_back("shape: " + wanted.first);
        } else if (!oracle.holders.contains(wanted)) {
          true_gaps.insert(wanted);
        } else if (oracle.dtype_conflicts.contains({name, wanted})) {
          true_dtypes.insert({name, wanted});
        }
      }
      if (element.tiles.size() + static_cast<size_t>(element.fills) > 1 && !overlap_named) {
        failures.push_back(name + "[" + std::to_string(e) + "]: overlap not reported");
      }
    }
  }
  if (gaps != true_gaps) failures.push_back("gaps differ from the truth");
  if (uncovered != true_uncovered) failures.push_back("uncovered elements differ from the truth");
  if (dtypes != true_dtypes) failures.push_back("dtype conflicts differ from the truth");
  return failures;
}

namespace {

Layout two_by_two(int64_t rows, Dtype dtype) {
  LayoutBuilder builder;
  const uint32_t tensor = builder.tensor({"t", Dtype::kF32, {2, 2}});
  const uint32_t parameter = builder.parameter({"p", dtype, 2 * rows});
  builder.tile(tensor, {{0, 0}, {rows, 2}}, parameter, 0);
  return builder.build().value();
}

TEST(Oracle, AcceptsAWholeCopy) {
  const Layout whole = two_by_two(2, Dtype::kF32);
  EXPECT_TRUE(Oracle(whole, std::vector{whole}).consistent());
}

TEST(Oracle, RefusesAMissingRowADtypeAndAForgottenParameter) {
  const Layout whole = two_by_two(2, Dtype::kF32);
  const Layout half = two_by_two(1, Dtype::kF32);
  const Layout narrow = two_by_two(2, Dtype::kBF16);
  EXPECT_FALSE(Oracle(whole, std::vector{half}).consistent());
  EXPECT_TRUE(Oracle(half, std::vector{whole}).consistent());
  EXPECT_TRUE(Oracle(narrow, std::vector{whole}).consistent());
  EXPECT_FALSE(Oracle(whole, std::vector{narrow}).consistent());
  LayoutBuilder builder;
  builder.parameter({"p", Dtype::kF32, 1});
  EXPECT_FALSE(Oracle(builder.build().value(), std::vector{whole}).consistent());
}

// A judge that finds nothing wrong with anything would prove nothing: a plan for other holders than
// the oracle's must be refused.
TEST(Oracle, JudgeRefusesAPlanThatMissesAHolder) {
  const Layout whole = two_by_two(2, Dtype::kF32);
  const Layout half = two_by_two(1, Dtype::kF32);
  const auto plan = compile(whole, std::vector{whole});
  ASSERT_TRUE(plan) << plan.error().message;
  EXPECT_TRUE(judge(*plan, Oracle(whole, std::vector{whole})).empty());
  EXPECT_FALSE(judge(*plan, Oracle(whole, std::vector{whole, half})).empty());
}

}  // namespace
}  // namespace transfuse
