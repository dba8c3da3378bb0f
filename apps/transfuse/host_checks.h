// What a refit needs of this host, each thing tried for real.
#pragma once

#include <string>
#include <vector>

namespace transfuse {

enum class CheckOutcome {
  kOk,
  kLimited,  // a slower or narrower way serves instead; `remedy` says what would widen it
  kMissing,  // a refit on this host cannot work without it
};
const char* check_outcome_name(CheckOutcome outcome);  // "ok", "limited", "missing"

struct HostCheck {
  std::string name;  // stable: a key of `transfuse doctor --json`
  CheckOutcome outcome = CheckOutcome::kOk;
  std::string found;
  std::string remedy;  // empty where nothing is to be done
};

HostCheck check_memfd();
HostCheck check_memory_room();
HostCheck check_process_vm_readv();
HostCheck check_pidfd();
HostCheck check_unix_sockets();
HostCheck check_cores();
HostCheck check_open_files();
HostCheck check_shmem_huge_pages();
HostCheck check_gpus();

// All of the above, in the order in which they are shown.
std::vector<HostCheck> check_host();

}  // namespace transfuse
