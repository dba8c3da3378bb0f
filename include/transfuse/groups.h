// Groups of targets, the ranks of one engine: what they decide and where they stand. Plain data.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace transfuse {

struct Decision {
  bool commit = false;
  std::string reason;  // of an abort: who gave up, and why
};

enum class GroupState : uint8_t {
  kForming,    // ranks have yet to join or to land their first version
  kWhole,      // every rank is there and holds the same version: the engine may serve
  kSwitching,  // a commit is decided, and not every rank has applied it yet
  kBroken,     // a rank was lost, or ranks hold different versions or none: no rank may serve
};
std::string_view group_state_name(GroupState state);

struct GroupRank {
  std::string name;
  uint64_t version = 0;  // held; 0: none
};

struct GroupInfo {
  std::string model;
  std::string name;
  uint32_t size = 0;
  GroupState state = GroupState::kForming;
  uint64_t version = 0;            // kWhole: of every rank
  uint64_t round = 0;              // under way; 0: none
  std::string reason{};            // why it is not whole, naming ranks
  std::vector<GroupRank> ranks{};  // alive
};

}  // namespace transfuse
