// A small file as text.
#include "read_file.h"

#include <fstream>
#include <ios>
#include <iterator>
#include <string>

#include "transfuse/result.h"

namespace transfuse {

Result<std::string> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) return Error{ErrorCode::kNotFound, "cannot read " + path};
  return text;
}

}  // namespace transfuse
