// A fixed form, little-endian, behind one word that says which memory it is.
#include "transport/cuda/memory_offer.h"

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <thread>

#include "base/seqlock.h"
#include "transfuse/deadline.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transport/cuda/device.h"

namespace transfuse::cuda {
namespace {

constexpr uint64_t kMagic = 0x32304D4544465254;  // "TRFDEM02"
constexpr size_t kWords = 9;
constexpr size_t kBodyAt = sizeof(uint64_t);  // behind the identity
constexpr size_t kUuidAt = kBodyAt + kWords * sizeof(uint64_t);
constexpr size_t kHandleAt = kUuidAt + sizeof(DeviceUuid);
static_assert(kHandleAt + sizeof(CUipcMemHandle) <= kOfferBytes);

constexpr uint64_t kBeingWritten = 0;  // also memory that was never written
constexpr uint64_t kWithdrawn = UINT64_MAX;

using Body = std::array<std::byte, kOfferBytes - kBodyAt>;
static_assert(sizeof(Body) % sizeof(uint64_t) == 0);

// Loads do not write: the words may lie in pages that are mapped read-only.
std::atomic_ref<uint64_t> word_at(const std::byte* place, size_t offset_bytes = 0) {
  auto* const word = const_cast<std::byte*>(place) + offset_bytes;  // NOLINT: see above
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(word));
}

void store(const Body& body, std::byte* place) {
  for (size_t at = 0; at < body.size(); at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, body.data() + at, sizeof(word));
    word_at(place, kBodyAt + at).store(word, std::memory_order_relaxed);
  }
}

Body load(const std::byte* place) {
  Body body;  // NOLINT: filled below
  for (size_t at = 0; at < body.size(); at += sizeof(uint64_t)) {
    const uint64_t word = word_at(place, kBodyAt + at).load(std::memory_order_relaxed);
    std::memcpy(body.data() + at, &word, sizeof(word));
  }
  return body;
}

Body encode(const MemoryOffer& offer) {
  Body body{};
  const std::array<uint64_t, kWords> words = {kMagic,
                                              offer.process,
                                              offer.identity,
                                              offer.allocation_bytes,
                                              offer.offset_bytes,
                                              offer.size_bytes,
                                              offer.address,
                                              static_cast<uint64_t>(offer.handles),
                                              offer.handle_count};
  std::memcpy(body.data(), words.data(), sizeof(words));
  std::memcpy(body.data() + kUuidAt - kBodyAt, offer.device.data(), offer.device.size());
  std::memcpy(body.data() + kHandleAt - kBodyAt, &offer.ipc_handle, sizeof(offer.ipc_handle));
  return body;
}

Result<MemoryOffer> decode(const Body& body, uint64_t identity) {
  std::array<uint64_t, kWords> words{};
  std::memcpy(words.data(), body.data(), sizeof(words));
  if (words[0] != kMagic || words[2] != identity) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: expected an offer ({:#x}) of memory {:#x}, found "
                             "{:#x} of {:#x}",
                             kMagic, identity, words[0], words[2])};
  }
  MemoryOffer offer{.process = words[1],
                    .identity = identity,
                    .allocation_bytes = words[3],
                    .offset_bytes = words[4],
                    .size_bytes = words[5],
                    .address = words[6],
                    .handles = RegionId{words[7]},
                    .handle_count = words[8]};
  if (offer.size_bytes == 0 || offer.offset_bytes > offer.allocation_bytes ||
      offer.size_bytes > offer.allocation_bytes - offer.offset_bytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: {} bytes at {} are not inside allocations of {}",
                             offer.size_bytes, offer.offset_bytes, offer.allocation_bytes)};
  }
  if (offer.handle_count > offer.allocation_bytes / kHandleGranularityBytes) {
    return Error{ErrorCode::kCorrupt,
                 fmt::format("device memory: {} allocations cannot have {} bytes together",
                             offer.handle_count, offer.allocation_bytes)};
  }
  std::memcpy(offer.device.data(), body.data() + kUuidAt - kBodyAt, offer.device.size());
  std::memcpy(&offer.ipc_handle, body.data() + kHandleAt - kBodyAt, sizeof(offer.ipc_handle));
  return offer;
}

}  // namespace

void publish_offer(std::span<std::byte, kOfferBytes> place, const MemoryOffer& offer) {
  const Body body = encode(offer);
  word_at(place.data()).store(kBeingWritten, std::memory_order_seq_cst);
  full_fence();
  store(body, place.data());
  full_fence();
  word_at(place.data()).store(offer.identity, std::memory_order_seq_cst);
}

void withdraw_offer(std::span<std::byte, kOfferBytes> place) {
  word_at(place.data()).store(kWithdrawn, std::memory_order_seq_cst);
}

Result<MemoryOffer> read_offer(std::span<const std::byte, kOfferBytes> place, Deadline deadline) {
  while (true) {
    const uint64_t identity = offered_identity(place);
    if (identity == kWithdrawn) {
      return Error{ErrorCode::kNotFound,
                   "device memory: it is not offered any more, or not mapped by its owner now"};
    }
    const Body body = load(place.data());
    full_fence();
    if (identity != kBeingWritten && offered_identity(place) == identity) {
      return decode(body, identity);
    }
    if (deadline.passed()) {
      return Error{ErrorCode::kUnavailable,
                   "device memory: its offer is not written to the end: its owner may have died"};
    }
    std::this_thread::yield();
  }
}

uint64_t offered_identity(std::span<const std::byte, kOfferBytes> place) {
  return word_at(place.data()).load(std::memory_order_acquire);
}

uint64_t make_identity(std::span<const uint64_t> words) {
  uint64_t state = 0x9E3779B97F4A7C15;
  for (const uint64_t word : words) {  // splitmix64's finisher over each
    state += word + 0x9E3779B97F4A7C15;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
    state ^= state >> 31;
  }
  return state == kBeingWritten || state == kWithdrawn ? 1 : state;
}

}  // namespace transfuse::cuda
