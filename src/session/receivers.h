// The two kinds of receiver.
#pragma once

#include <memory>

#include "session/shadow.h"
#include "session/target_member.h"
#include "transfuse/control.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

namespace transfuse {

std::unique_ptr<Receiver> make_in_place_receiver(Transport& transport, Control& control,
                                                 std::unique_ptr<TargetMember> member);
std::unique_ptr<Receiver> make_shadow_receiver(Transport& transport, Control& control,
                                               std::unique_ptr<TargetMember> member,
                                               std::unique_ptr<Shadow> shadow);

}  // namespace transfuse
