// A fixed form, little-endian.
#include "transport/cuda/memory_offer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "transfuse/result.h"

namespace transfuse::cuda {
namespace {

constexpr uint64_t kMagic = 0x31304D4544465254;  // "TRFDEM01"
constexpr size_t kWords = 7;
constexpr size_t kUuidAt = kWords * sizeof(uint64_t);
constexpr size_t kHandleAt = kUuidAt + sizeof(DeviceUuid);
static_assert(kHandleAt + sizeof(CUipcMemHandle) <= kOfferBytes);

}  // namespace

void MemoryOffer::encode(std::span<std::byte, kOfferBytes> out) const {
  std::ranges::fill(out, std::byte{0});
  const std::array<uint64_t, kWords> words = {
      kMagic, process, allocation, allocation_bytes, offset_bytes, size_bytes, address};
  std::memcpy(out.data(), words.data(), sizeof(words));
  std::memcpy(out.data() + kUuidAt, device.data(), device.size());
  std::memcpy(out.data() + kHandleAt, &handle, sizeof(handle));
}

Result<MemoryOffer> MemoryOffer::decode(std::span<const std::byte, kOfferBytes> bytes) {
  std::array<uint64_t, kWords> words{};
  std::memcpy(words.data(), bytes.data(), sizeof(words));
  if (words[0] != kMagic) {
    return Error{ErrorCode::kCorrupt, fmt::format("device memory: expected an offer ({:#x}), found "
                                                  "{:#x}",
                                                  kMagic, words[0])};
  }
  MemoryOffer offer{.process = words[1],
                    .allocation = words[2],
                    .allocation_bytes = words[3],
                    .offset_bytes = words[4],
                    .size_bytes = words[5],
                    .address = words[6]};
  if (offer.size_bytes == 0 || offer.offset_bytes > offer.allocation_bytes ||
      offer.size_bytes > offer.allocation_bytes - offer.offset_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: {} bytes at {} are not inside an allocation of {}",
                             offer.size_bytes, offer.offset_bytes, offer.allocation_bytes)};
  }
  std::memcpy(offer.device.data(), bytes.data() + kUuidAt, offer.device.size());
  std::memcpy(&offer.handle, bytes.data() + kHandleAt, sizeof(offer.handle));
  return offer;
}

}  // namespace transfuse::cuda
