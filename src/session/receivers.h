// The two kinds of receiver.
#pragma once

#include <memory>

#include "session/shadow.h"
#include "session/target_member.h"
#include "transfuse/control.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// One line for a refit that has ended.
void log_refit(const ReceiverOptions& options, const RefitReport& report,
               const Result<void>& outcome);

std::unique_ptr<Receiver> make_in_place_receiver(Transport& transport, Control& control,
                                                 std::unique_ptr<TargetMember> member);
std::unique_ptr<Receiver> make_shadow_receiver(Transport& transport, Control& control,
                                               std::unique_ptr<TargetMember> member,
                                               std::unique_ptr<Shadow> shadow);

}  // namespace transfuse
