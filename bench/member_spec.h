// What every member process of a measurement is told when it starts.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::bench {

struct MemberSpec {
  ModelConfig config;
  std::string layout;  // a parallelism spec: "fsdp:dp=2"
  int64_t rank = 0;
  std::string stream;  // the model name under which versions are published
  std::string runtime_folder;
  std::string address{};  // of the coordinator; "": the embedded one of the folder
  uint32_t threads = 0;   // of the transport; 0: one per core
};
nlohmann::json to_json(const MemberSpec& spec);
// Throws as nlohmann::json does: for decode_spec().
MemberSpec member_spec_from_json(const nlohmann::json& json);

// Any specification from its JSON; kInvalidArgument says what is wrong with it.
template <typename Spec, typename FromJson>
Result<Spec> decode_spec(std::string_view text, FromJson from_json) {
  try {
    return Result<Spec>(from_json(nlohmann::json::parse(text)));
  } catch (const nlohmann::json::exception& error) {
    return Error{ErrorCode::kInvalidArgument,
                 std::string("the specification of a process: ") + error.what()};
  }
}

}  // namespace transfuse::bench
