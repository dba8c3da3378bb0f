// Memory that processes read of each other: what is offered, what travels, and the two ends.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "transfuse/result.h"

namespace transfuse {

enum class RegionId : uint64_t {};  // unique in one transport instance, never reused

// Whose memory it is: addresses of kDevice are for the transport and the device, not for the CPU.
enum class MemoryPlace : uint8_t { kHost, kDevice };

// What a peer must know to open a region; travels over the control plane.
struct RegionDescriptor {
  RegionId id{};
  uint64_t size_bytes = 0;
  MemoryPlace place = MemoryPlace::kHost;
};

// A file descriptor that stands for memory which others than the transport map: an exported handle
// of GPU memory. Whoever gets it closes it.
struct MemoryHandle {
  int fd = -1;
  uint64_t size_bytes = 0;
};
// Makes handle number `index` anew, for one peer. Called from a thread of the transport, one call
// at a time, while the region lives; waits for nobody.
using HandleMaker = std::function<Result<MemoryHandle>(uint64_t index)>;
inline Error carries_no_handles() {
  return {ErrorCode::kUnsupported, "this transport carries no handles of memory"};
}

// Memory of this process that peers may read. The destructor ends the registration: peers that open
// it afterwards are refused; what a peer mapped before stays mapped there until it closes its
// handle. Must not outlive its transport.
class LocalRegion {
 public:
  virtual ~LocalRegion() = default;
  LocalRegion(const LocalRegion&) = delete;
  LocalRegion& operator=(const LocalRegion&) = delete;
  virtual std::span<std::byte> bytes() const = 0;
  virtual RegionDescriptor descriptor() const = 0;
  MemoryPlace place() const { return descriptor().place; }
  // To be called before a version of the bytes is published: where other memory was mapped at the
  // same address since (an engine that slept), readers learn of it and open it anew. Cheap.
  // kUnavailable: nothing is mapped there now.
  virtual Result<void> refresh() { return {}; }

 protected:
  LocalRegion() = default;
};

// A region of another process, opened for reading. The destructor ends every ticket that still
// reads it: when it returns, no later write of theirs is possible. Must not outlive its peer.
class RemoteRegion {
 public:
  virtual ~RemoteRegion() = default;
  RemoteRegion(const RemoteRegion&) = delete;
  RemoteRegion& operator=(const RemoteRegion&) = delete;
  virtual uint64_t size_bytes() const = 0;
  // How its bytes travel, in words for reports: "memfd", "process_vm_readv", "local".
  virtual std::string_view route() const = 0;
  // Many bytes of it will be read into memory of that place, cycle after cycle: what can be
  // prepared for that is. Before its first read.
  virtual void expect_reads(MemoryPlace /*target*/) {}
  // True: reads of it and of other such regions of its peer are best made in one large request.
  virtual bool joins_requests() const { return false; }
  // Its bytes where this process sees them without a read; empty where it does not.
  virtual std::span<const std::byte> mapped() const { return {}; }
  // False once its owner offers other memory under this region (LocalRegion::refresh), or none:
  // reads of it fail, and it is to be opened anew. Never blocks.
  virtual bool current() const { return true; }

 protected:
  RemoteRegion() = default;
};

}  // namespace transfuse
