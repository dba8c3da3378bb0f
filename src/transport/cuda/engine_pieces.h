// Long contiguous pieces of memory that the GPU's copy engines move, dealt to several streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {

struct EnginePiece {
  uint64_t source_offset = 0;  // bytes from the source's base
  uint64_t target = 0;         // device address
  uint64_t size_bytes = 0;
  uint32_t source = 0;  // whose base
  uint32_t copy = 0;    // which of the caller's copies it is
};

// Pieces in legs, one after another, so that what has landed can be looked at while the rest is on
// its way. Used from one thread; outlived by the device.
class EnginePieces {
 public:
  EnginePieces() = default;  // none
  // With `legs`, each moves three quarters of what is left until little is: to look at one takes
  // less time than the next one needs, and no time in the end. Without, all is one leg.
  static Result<EnginePieces> make(const Device& device, std::vector<EnginePiece> pieces,
                                   bool legs);

  bool empty() const { return pieces_.empty(); }
  size_t leg_count() const { return legs_.size(); }
  std::span<const EnginePiece> leg(size_t number) const;

  // Device addresses of the sources, as this process sees them.
  void set_bases(std::span<const CUdeviceptr> bases);
  // What is launched next comes after what `stream` was given before.
  Result<void> come_after(CUstream stream);
  // Puts the leg on streams of its own, after the one before, and returns.
  Result<void> launch(size_t leg);
  // What `stream` is given next comes after that leg, which was launched, and those before.
  Result<void> let_follow(CUstream stream, size_t leg);
  // Until nothing that was launched is still moving.
  void wait();

 private:
  static constexpr size_t kStreams = 4;
  struct Leg {
    size_t begin = 0;
    size_t end = 0;
    // Of each stream, one after another from `begin` on.
    size_t count[kStreams] = {};
    Event ends[kStreams];
  };

  const Device* device_ = nullptr;
  std::vector<EnginePiece> pieces_;  // leg by leg, stream by stream
  std::vector<Leg> legs_;
  // Of pieces_, as the driver takes them.
  std::vector<CUdeviceptr> targets_;
  std::vector<CUdeviceptr> sources_;
  std::vector<size_t> sizes_;
  Stream streams_[kStreams];
  Event begin_;
};

}  // namespace transfuse::cuda
