// The slow truth for tests: what a refit must do, element by element. Shares no code with the
// planner, so that it may judge it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/layout.h"
#include "transfuse/plan.h"

namespace transfuse {

// An element of the model: tensor name and row-major index.
using CatalogElement = std::pair<std::string, int64_t>;

// What the layouts say of one element of a target parameter.
struct TargetElement {
  std::vector<CatalogElement> tiles;  // one entry per tile that writes it
  int fills = 0;
};

struct Oracle {
  Oracle(const Layout& target, std::span<const Layout> sources);

  // By target parameter name, one entry per element.
  std::map<std::string, std::vector<TargetElement>> parameters;
  // Layouts that hold an element, by its row-major index.
  std::map<CatalogElement, std::set<Digest>> holders;
  // Layouts that hold an element needed by the target parameter in a dtype without a cast.
  std::set<std::pair<std::string, CatalogElement>> dtype_conflicts;
  std::set<std::string> tensors_of_other_shape;
  std::set<std::string> known_tensors;

  // True if a plan must exist.
  bool consistent() const;
};

// What bytes an element has in these tests: a value of its identity in the bits of `dtype`, so
// chosen that f32 -> bf16 is exact.
uint64_t element_bits(const CatalogElement& element, Dtype dtype);

// One layout's parameters as real bytes.
class ByteWorld {
 public:
  explicit ByteWorld(const Layout& layout);  // all 0xEE
  void write_tiles();                        // what a source holds
  void write_fills();                        // zeros
  uint64_t load(uint32_t parameter, int64_t element) const;
  void store(uint32_t parameter, int64_t element, uint64_t bits);

 private:
  Layout layout_;
  std::vector<std::vector<std::byte>> parameters_;
};

// Checks, with one message per failure: every target element is written exactly once and by a run
// that names the right catalog element; every run lists exactly the layouts that hold it; the bytes
// are right whichever holder serves; chunks partition the runs and stay within chunk_bytes.
std::vector<std::string> judge(const Plan& plan, const Oracle& oracle);

// Checks that the findings name exactly the elements that are at fault.
std::vector<std::string> judge(const std::vector<Finding>& findings, const Layout& target,
                               const Oracle& oracle);

}  // namespace transfuse
