// The embedded coordinator, seen from a member: find it, or start it under the lock.
#pragma once

#include <string>

#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

// Returns when somebody listens on paths.socket. kNotFound: no program to start, all places are
// named. kUnavailable: it was started and ended; its own words are in the message.
Result<void> ensure_coordinator(const RuntimePaths& paths, const ConnectOptions& options,
                                Deadline deadline);

// The folder of the library or program that this code is linked into.
std::string own_folder();

// The program that serves, see ConnectOptions::serve_command; `beside` is where it lies by default.
Result<std::string> find_serve_program(const std::string& serve_command, const std::string& beside);

}  // namespace transfuse
