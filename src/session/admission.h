// Which sources of a lease a target reads from, and why not from the others.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"

namespace transfuse {

// The coordinator has looked at what sources say; what they say of tensors is in their layouts,
// which only a target reads. Used from one thread.
class Admission {
 public:
  using GetLayout = std::function<Result<Layout>(const Digest&)>;

  explicit Admission(Demand demand) : demand_(std::move(demand)) {}
  // kInvalidArgument: see check_demand().
  Result<void> set_demand(std::string_view whose, Demand demand);

  // Fills admitted(); every refusal is a step of the report, once. kFingerprintMismatch: admitted
  // sources state different revisions, so not all of them hold the version's bytes.
  Result<void> admit(const Lease& lease, const GetLayout& get_layout, RefitReport& report);
  std::span<const MemberInfo> admitted() const { return admitted_; }

  // `error`: from compiling a plan for `target` from `sources`, the layouts of those admitted.
  // kNoFittingSource, naming tensor, source and reason, where a refused source holds what lacks.
  Error explain(Error error, const Layout& target, std::span<const Layout> sources,
                const GetLayout& get_layout) const;

 private:
  struct Verdict {
    Digest layout;
    std::optional<std::string> misfit;
  };
  bool needs_layouts() const;
  Result<void> judge_layouts(const Lease& lease, const GetLayout& get_layout);
  Result<void> compare_revisions(const Lease& lease) const;
  void tell(const Lease& lease, RefitReport& report) const;

  Demand demand_;
  std::vector<Verdict> verdicts_;  // of the layouts of the last lease
  std::vector<MemberInfo> admitted_;
  std::vector<Refusal> refused_;
};

}  // namespace transfuse
