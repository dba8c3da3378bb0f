// What this process holds of the system, and rights that it gives up for a test.
#pragma once

#include <nlohmann/json.hpp>

#include "transfuse/result.h"

namespace transfuse::faults {

// Open descriptors, threads, resident and allocated bytes.
nlohmann::json process_facts();

// Afterwards the kernel refuses process_vm_readv to this process where its target is not its own
// child in rights: what an engine without privileges meets.
Result<void> drop_ptrace_right();
// Afterwards only privileged processes may read the memory of this one.
Result<void> hide_memory();

}  // namespace transfuse::faults
