// A small file as text.
#pragma once

#include <string>

#include "transfuse/result.h"

namespace transfuse {

// kNotFound where it cannot be read.
Result<std::string> read_file(const std::string& path);

}  // namespace transfuse
