// A second copy of the parameters: what a receiver writes while the engine serves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "session/copy_threads.h"
#include "session/memory.h"
#include "transfuse/layout.h"
#include "transfuse/receiver.h"
#include "transfuse/transport.h"

namespace transfuse {

// Owns one region of the transport and the threads that copy; not the parameters, which outlive it.
// Used from one thread, but data() is for whoever writes the shadow meanwhile.
class Shadow {
 public:
  // kResourceExhausted says how many bytes are needed. kUnsupported: options.keep_previous, and two
  // parameters share memory.
  static Result<std::unique_ptr<Shadow>> open(Transport& transport, const Layout& layout,
                                              const BoundMemory& parameters,
                                              const ReceiverOptions& options);

  std::span<std::byte* const> data() const { return data_; }  // per parameter
  // The parameters hold what the shadow holds.
  void copy_to_parameters();
  // And the shadow what they held.
  void exchange();

 private:
  struct Piece {
    std::byte* shadow = nullptr;
    std::byte* parameter = nullptr;
    size_t size_bytes = 0;
  };

  Shadow() = default;

  std::unique_ptr<LocalRegion> region_;
  std::unique_ptr<CopyThreads> threads_;
  std::vector<std::byte*> data_;
  std::vector<Piece> pieces_;
};

}  // namespace transfuse
