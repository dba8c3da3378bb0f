// The side that is read: offers the weights of one process, version after version.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/transport.h"

namespace transfuse {

// Where a parameter of this process lies. Memory inside a region of `transport` (allocate()) is
// read at its best; anything else is registered as the caller's own memory.
struct ParameterMemory {
  std::string name;
  std::byte* data = nullptr;
  uint64_t size_bytes = 0;
};

struct PublisherOptions {
  std::string model = "model";
  std::string name;                        // of this source, unique in the model: "trainer0"
  uint32_t source_count = 1;               // sources that make a version complete
  std::vector<const LocalRegion*> arenas;  // outlive the publisher
  std::string token;                       // TransportOptions::token of `transport`
  uint32_t fingerprint_threads = 0;        // 0: one per core that this process may use
  int64_t drain_ms = 30000;  // begin_write() waits so long for readers, then revokes them
};

struct WriteTiming {
  int64_t waited_us = 0;  // for readers
  uint32_t revoked = 0;
};

// in_place: the weights are read where the trainer keeps them. Between begin_write() and publish()
// nobody may read; outside of it the caller must not write. `transport` and `control` outlive it.
// Used from one thread at a time.
class Publisher {
 public:
  // `memory` names every parameter of `layout` exactly once (I2: by name). Fails with
  // kInvalidArgument, kLayoutMismatch (a parameter has another size), kAlreadyExists (a live
  // publisher has the name), kUnavailable.
  static Result<std::unique_ptr<Publisher>> open(Transport& transport, Control& control,
                                                 const Layout& layout,
                                                 std::vector<ParameterMemory> memory,
                                                 const PublisherOptions& options);
  virtual ~Publisher() = default;  // leaves; a version that is being written is aborted

  // Versions rise. Waits for readers (options.drain_ms), then revokes them.
  virtual Result<WriteTiming> begin_write(uint64_t version) = 0;
  virtual Result<void> publish(uint64_t version) = 0;
  // Gives up the version that is being written: nothing of it is ever visible, and the version
  // before is gone too.
  virtual Result<void> abort_write(std::string_view reason) = 0;
  virtual uint64_t version() const = 0;  // last published, 0 if none or while writing
  virtual Result<void> close() = 0;
};

}  // namespace transfuse
