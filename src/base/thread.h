// Threads whose start can fail.
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "transfuse/result.h"

namespace transfuse {

// kResourceExhausted where the host or a control group allows no more threads. `body` runs on the
// new thread; `name` is for the message.
template <typename F>
Result<std::thread> start_thread(const char* name, F body) {
  try {
    return std::thread(std::move(body));
  } catch (const std::system_error& error) {  // the only way in which std::thread fails
    return Error{
        ErrorCode::kResourceExhausted,
        std::string("the ") + name + " thread could not be started: " + error.code().message()};
  }
}

}  // namespace transfuse
