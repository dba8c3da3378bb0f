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

// What an exchange on a device holds between its two sides.
inline constexpr uint64_t kHeldBytes = uint64_t{1} << 30;

// Owns one region of the transport in the place of the parameters, and the threads that copy (a
// device needs none); not the parameters, which outlive it. Used from one thread, but memory() is
// for whoever writes the shadow meanwhile.
class Shadow {
 public:
  // kResourceExhausted says how many bytes are needed. kUnsupported: options.keep_previous, and two
  // parameters share memory.
  static Result<std::unique_ptr<Shadow>> open(Transport& transport, const Layout& layout,
                                              const BoundMemory& parameters,
                                              const ReceiverOptions& options);

  TargetMemory memory() const { return {.data = data_, .place = region_->place()}; }
  // The parameters hold what the shadow holds. An error is one of the device: what they hold then
  // is not known.
  Result<void> copy_to_parameters();
  // And the shadow what they held.
  Result<void> exchange();

 private:
  struct Piece {
    std::byte* shadow = nullptr;
    std::byte* parameter = nullptr;
    size_t size_bytes = 0;
  };

  explicit Shadow(Transport& transport) : transport_(transport) {}
  static Result<void> check_room(const Layout& layout, const ReceiverOptions& options);
  Result<void> exchange_on_device();

  Transport& transport_;
  std::unique_ptr<LocalRegion> region_;
  std::unique_ptr<LocalRegion> held_;     // on a device: between the two sides of an exchange
  std::unique_ptr<CopyThreads> threads_;  // null: on a device
  std::vector<std::byte*> data_;
  std::vector<Piece> pieces_;
};

}  // namespace transfuse
