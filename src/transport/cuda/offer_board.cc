// Numbers of places, and boards that go with their last offer.
#include "transport/cuda/offer_board.h"

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <utility>

#include "base/mutex.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/memory_offer.h"

namespace transfuse::cuda {
namespace {

constexpr uint64_t kDeviceBit = uint64_t{1} << 63;
constexpr int kSlotShift = 48;
constexpr uint64_t kBoardMask = (uint64_t{1} << kSlotShift) - 1;
static_assert(kOffersPerBoard <= uint64_t{1} << (63 - kSlotShift));

}  // namespace

RegionId device_region(const OfferPlace& place) {
  const auto board = static_cast<uint64_t>(place.board);
  TRANSFUSE_CHECK(board <= kBoardMask && place.slot < kOffersPerBoard);
  return RegionId{kDeviceBit | (place.slot << kSlotShift) | board};
}

std::optional<OfferPlace> offer_place(RegionId region) {
  const auto number = static_cast<uint64_t>(region);
  if ((number & kDeviceBit) == 0) return std::nullopt;
  return OfferPlace{.board = RegionId{number & kBoardMask},
                    .slot = (number & ~kDeviceBit) >> kSlotShift};
}

OfferBoards::Slot::~Slot() {
  if (boards_ == nullptr) return;
  withdraw_offer(bytes());
  boards_->release(board_);
}

std::span<std::byte, kOfferBytes> OfferBoards::Slot::bytes() const {
  return board_->region->bytes().subspan(at_ * kOfferBytes).first<kOfferBytes>();
}

Result<OfferBoards::Slot> OfferBoards::take() {
  const MutexLock lock(mutex_);
  if (boards_.empty() || boards_.back().given == kOffersPerBoard) {
    TRANSFUSE_ASSIGN_OR_RETURN(auto region, host_.allocate(kBoardBytes));
    boards_.push_back({.region = std::move(region)});
  }
  const auto board = std::prev(boards_.end());
  ++board->live;
  return Slot(this, board, board->given++);
}

void OfferBoards::release(std::list<Board>::iterator board) {
  const MutexLock lock(mutex_);
  if (--board->live == 0) boards_.erase(board);
}

}  // namespace transfuse::cuda
