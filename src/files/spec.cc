// Parallel specs whose options name files.
#include <fmt/format.h>

#include <fstream>
#include <ios>
#include <iterator>
#include <string>
#include <string_view>

#include "transfuse/checkpoint.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse {

Result<ParallelSpec> read_parallel_spec(std::string_view text) {
  TRANSFUSE_ASSIGN_OR_RETURN(ParallelSpec spec, parse_parallel_spec(text));
  if (spec.expert_map_path.empty()) return spec;
  std::ifstream file(spec.expert_map_path, std::ios::binary);
  const std::string json{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("expert_map={}: cannot read the file", spec.expert_map_path)};
  }
  auto map = parse_expert_map(json);
  if (!map) {
    return Error{map.error().code,
                 fmt::format("expert_map={}: {}", spec.expert_map_path, map.error().message)};
  }
  spec.expert_map = *map;
  return spec;
}

}  // namespace transfuse
