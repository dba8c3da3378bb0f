// Where the offers of a process lie: many in one region of the host, so that a thousand regions of
// device memory do not cost a thousand descriptors here and mappings at every reader.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "base/mutex.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {

inline constexpr uint64_t kOffersPerBoard = 256;
inline constexpr uint64_t kBoardBytes = kOffersPerBoard * kOfferBytes;

// Where an offer lies: a region of the host, and which of its offers.
struct OfferPlace {
  RegionId board{};
  uint64_t slot = 0;
  bool operator==(const OfferPlace&) const = default;
};
// Numbers of regions of device memory are none of the host's; each place has its own.
RegionId device_region(const OfferPlace& place);
// nullopt: a region of the host.
std::optional<OfferPlace> offer_place(RegionId region);

// Safe to call from any thread. Outlived by the transport.
class OfferBoards {
 private:
  struct Board {
    std::unique_ptr<LocalRegion> region;
    uint64_t given = 0;  // slots; none twice, so that the number of a region is never reused
    uint64_t live = 0;
  };

 public:
  // A slot, withdrawn by its destructor: also readers that have the board open see it. Outlived by
  // the boards.
  class Slot {
   public:
    Slot(Slot&& other) noexcept
        : boards_(std::exchange(other.boards_, nullptr)), board_(other.board_), at_(other.at_) {}
    Slot& operator=(Slot&&) = delete;
    ~Slot();
    std::span<std::byte, kOfferBytes> bytes() const;
    OfferPlace place() const { return {.board = board_->region->descriptor().id, .slot = at_}; }

   private:
    friend class OfferBoards;
    Slot(OfferBoards* boards, std::list<Board>::iterator board, uint64_t at)
        : boards_(boards), board_(board), at_(at) {}
    OfferBoards* boards_;  // null: nothing to release
    std::list<Board>::iterator board_;
    uint64_t at_;
  };

  explicit OfferBoards(Transport& host) : host_(host) {}
  Result<Slot> take() EXCLUDES(mutex_);

 private:
  void release(std::list<Board>::iterator board) EXCLUDES(mutex_);

  Transport& host_;
  Mutex mutex_;
  std::list<Board> boards_ GUARDED_BY(mutex_);  // slots are given of the last one
};

}  // namespace transfuse::cuda
