// The stream of version changes, client side.
#pragma once

#include <memory>
#include <string_view>

#include "rpc/connection.h"
#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

// Outlives breaks of the connection: it watches again, and what changed meanwhile is told then.
Result<std::unique_ptr<Watch>> open_watch(std::shared_ptr<Connection> connection,
                                          std::string_view model);

}  // namespace transfuse
