// A trainer rank in a process of its own: this program again, as `transfuse bench-source`, told
// what to do over a pipe.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>

#include "base/unique_fd.h"
#include "transfuse/model.h"
#include "transfuse/result.h"

namespace transfuse::bench {

// Where the weights of a source lie.
enum class SourceMemory : uint8_t {
  kMemfd,   // memory that Transfuse allocated
  kPrivate  // the process's own: read by process_vm_readv
};

struct SourceSpec {
  ModelConfig config;
  std::string layout;  // a parallelism spec: "fsdp:dp=2"
  int64_t rank = 0;
  SourceMemory memory = SourceMemory::kMemfd;
  std::string stream;  // the model name under which versions are published
  std::string runtime_folder;
};
std::string encode(const SourceSpec& spec);
Result<SourceSpec> decode_source_spec(std::string_view text);

// What a source says of itself, for what it holds beyond its weights.
struct SourceUsage {
  uint64_t anonymous_bytes = 0;  // resident private memory since before the publisher was opened
  uint64_t open_files = 0;
  uint64_t regions = 0;  // live registrations
};

// The reading end's handle. The destructor ends the process. Used from one thread.
class SourceProcess {
 public:
  static Result<std::unique_ptr<SourceProcess>> start(const SourceSpec& spec);
  ~SourceProcess();
  SourceProcess(const SourceProcess&) = delete;
  SourceProcess& operator=(const SourceProcess&) = delete;

  Result<void> publish(uint64_t version);
  Result<SourceUsage> usage();

 private:
  SourceProcess(pid_t pid, UniqueFd to, FILE* from, std::string name);
  Result<std::string> answer(std::string_view order);
  Error gone() const;

  const pid_t pid_;
  UniqueFd to_;
  FILE* const from_;
  const std::string name_;
};

// The other end: serves orders from stdin until it closes. An error is answered, not returned.
Result<void> run_source(const SourceSpec& spec);

}  // namespace transfuse::bench
