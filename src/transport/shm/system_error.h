// errno in words.
#pragma once

#include <string>
#include <system_error>

namespace transfuse::shm {

inline std::string errno_text(int number) { return std::generic_category().message(number); }

}  // namespace transfuse::shm
