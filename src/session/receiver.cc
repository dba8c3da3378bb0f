// Opening a receiver of either kind.
#include "transfuse/receiver.h"

#include <fmt/format.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "session/memory.h"
#include "session/receivers.h"
#include "session/shadow.h"
#include "session/target_member.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/memory_need.h"
#include "transfuse/metadata.h"
#include "transfuse/publisher.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

Result<void> check_options(const ReceiverOptions& options) {
  if (options.name.empty() || options.model.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("a receiver needs a model and a name; found model '{}', name '{}'",
                             options.model, options.name)};
  }
  if (options.keep_previous && options.into != ReceiveInto::kShadow) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("receiver '{}': the version before can be kept only in a shadow",
                             options.name)};
  }
  if (options.group.empty() != (options.group_size == 0)) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("receiver '{}': a group needs a name and a size; found '{}', size {}",
                             options.name, options.group, options.group_size)};
  }
  if (options.checkpoint && options.checkpoint->path.empty()) {
    return Error{
        ErrorCode::kInvalidArgument,
        fmt::format("receiver '{}': a checkpoint needs a path; found an empty one", options.name)};
  }
  if (options.checkpoint) {
    const std::string whose = "checkpoint " + options.checkpoint->path;
    TRANSFUSE_RETURN_IF_ERROR(check_kind(whose, options.checkpoint->kind));
    TRANSFUSE_RETURN_IF_ERROR(check_metadata(whose, options.checkpoint->metadata));
  }
  return check_demand(fmt::format("receiver '{}'", options.name), options.demand);
}

}  // namespace

Result<std::unique_ptr<Receiver>> Receiver::open(Transport& transport, Control& control,
                                                 const Layout& layout,
                                                 std::vector<ParameterMemory> memory,
                                                 const ReceiverOptions& asked) {
  TRANSFUSE_RETURN_IF_ERROR(check_options(asked));
  ReceiverOptions options = asked;
  TRANSFUSE_ASSIGN_OR_RETURN(
      BoundMemory bound,
      BoundMemory::open(transport, layout, memory, options.arenas, BoundMemory::Use::kTarget));
  options.plan = plan_options_for(bound.place(), options.plan);
  std::unique_ptr<Shadow> shadow;
  if (options.into == ReceiveInto::kShadow) {
    TRANSFUSE_ASSIGN_OR_RETURN(shadow, Shadow::open(transport, layout, bound, options));
  }
  TRANSFUSE_ASSIGN_OR_RETURN(
      auto member, TargetMember::open(transport, control, layout, std::move(bound), options));
  if (shadow == nullptr) return make_in_place_receiver(transport, control, std::move(member));
  return make_shadow_receiver(transport, control, std::move(member), std::move(shadow));
}

}  // namespace transfuse
