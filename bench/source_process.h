// A trainer rank in a process of its own: `transfuse bench-source`.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "child_process.h"
#include "member_spec.h"
#include "transfuse/result.h"

namespace transfuse::bench {

// Where the weights of a source lie.
enum class SourceMemory : uint8_t {
  kMemfd,   // memory that Transfuse allocated
  kPrivate  // the process's own: read by process_vm_readv
};

struct SourceSpec {
  MemberSpec member;
  SourceMemory memory = SourceMemory::kMemfd;
  uint32_t snapshot_slots = 0;  // 0: versions are read in place
};
std::string encode(const SourceSpec& spec);
Result<SourceSpec> decode_source_spec(std::string_view text);

// The commanding end. The destructor ends the process. Used from one thread.
class SourceProcess {
 public:
  static Result<std::unique_ptr<SourceProcess>> start(const SourceSpec& spec);
  Result<void> publish(uint64_t version);
  Result<ProcessUsage> usage() { return child_->usage(); }

 private:
  explicit SourceProcess(std::unique_ptr<ChildProcess> child) : child_(std::move(child)) {}
  std::unique_ptr<ChildProcess> child_;
};

// The other end: serves orders from stdin until it closes. An error is answered, not returned.
Result<void> run_source(const SourceSpec& spec);

}  // namespace transfuse::bench
