// Pieces of parameters, copied and exchanged past the caches.
#include "session/shadow.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "base/affinity.h"
#include "base/memory_room.h"
#include "copy/copy.h"
#include "session/copy_threads.h"
#include "session/device_work.h"
#include "session/memory.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kAlignment = 64;
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;  // enough of them for even shares
constexpr size_t kBlockBytes = 16384;                // of an exchange: two fit a first-level cache

uint64_t aligned(uint64_t size_bytes) {
  return (size_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

void copy_bytes(std::byte* target, const std::byte* source, size_t size_bytes) {
  StridedCopy copy;
  copy.target = target;
  copy.count[2] = static_cast<uint32_t>(size_bytes);
  copy.source_stride[2] = copy.target_stride[2] = 1;
  run_copy(copy, source);
}

void exchange_bytes(std::byte* a, std::byte* b, size_t size_bytes) {
  alignas(kAlignment) std::array<std::byte, kBlockBytes> held;
  for (size_t done = 0; done < size_bytes; done += kBlockBytes) {
    const size_t size = std::min(kBlockBytes, size_bytes - done);
    std::memcpy(held.data(), a + done, size);
    std::memcpy(a + done, b + done, size);
    std::memcpy(b + done, held.data(), size);
  }
}

// An exchange of memory that two parameters share would bring back one of them twice.
Result<void> check_apart(const Layout& layout, const BoundMemory& parameters) {
  struct Span {
    const std::byte* begin;
    const std::byte* end;
    uint32_t parameter;
  };
  std::vector<Span> spans;
  for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
    const uint64_t size = parameter_size_bytes(layout.parameters()[i]);
    if (size > 0) spans.push_back({parameters.data(i), parameters.data(i) + size, i});
  }
  std::ranges::sort(spans, {}, &Span::begin);
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].begin >= spans[i - 1].end) continue;
    return Error{ErrorCode::kUnsupported,
                 fmt::format("keep_previous needs parameters that lie apart; '{}' and '{}' share "
                             "memory",
                             layout.parameters()[spans[i - 1].parameter].name,
                             layout.parameters()[spans[i].parameter].name)};
  }
  return {};
}

}  // namespace

uint64_t shadow_bytes(const Layout& layout) { return snapshot_bytes(layout, 1); }

Result<std::unique_ptr<Shadow>> Shadow::open(Transport& transport, const Layout& layout,
                                             const BoundMemory& parameters,
                                             const ReceiverOptions& options) {
  if (options.keep_previous) TRANSFUSE_RETURN_IF_ERROR(check_apart(layout, parameters));
  std::unique_ptr<Shadow> shadow(new Shadow(transport));
  const uint64_t needed = shadow_bytes(layout);
  if (parameters.place() == MemoryPlace::kDevice) {
    TRANSFUSE_ASSIGN_OR_RETURN(shadow->region_, transport.allocate_on_device(needed));
    if (options.keep_previous) {
      TRANSFUSE_ASSIGN_OR_RETURN(shadow->held_,
                                 transport.allocate_on_device(std::min(needed, kHeldBytes)));
    }
  } else {
    TRANSFUSE_RETURN_IF_ERROR(check_room(layout, options));
    TRANSFUSE_ASSIGN_OR_RETURN(shadow->region_, transport.allocate(needed));
    TRANSFUSE_ASSIGN_OR_RETURN(shadow->threads_, CopyThreads::open(usable_core_count()));
  }
  const uint64_t piece_bytes = shadow->threads_ == nullptr ? kHeldBytes : kPieceBytes;
  std::byte* at = shadow->region_->bytes().data();
  for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
    const uint64_t size = parameter_size_bytes(layout.parameters()[i]);
    shadow->data_.push_back(at);
    for (uint64_t done = 0; done < size; done += piece_bytes) {
      shadow->pieces_.push_back({.shadow = at + done,
                                 .parameter = parameters.data(i) + done,
                                 .size_bytes = std::min(piece_bytes, size - done)});
    }
    at += aligned(size);
  }
  return shadow;
}

Result<void> Shadow::check_room(const Layout& layout, const ReceiverOptions& options) {
  const uint64_t needed = shadow_bytes(layout);
  const MemoryRoom room = memory_room();
  if (needed <= room.size_bytes) return {};
  return Error{ErrorCode::kResourceExhausted,
               fmt::format("the shadow of receiver '{}' needs {} bytes, {} leaves {}: receive in "
                           "place, which needs none",
                           options.name, needed, room.limit, room.size_bytes)};
}

Result<void> Shadow::copy_to_parameters() {
  if (threads_ == nullptr) {
    std::vector<StridedCopy> copies;
    for (const Piece& piece : pieces_) {
      add_plain(copies, piece.parameter, piece.shadow, piece.size_bytes);
    }
    return run_on_device(transport_, copies, {});
  }
  threads_->run(pieces_.size(), [this](size_t i) {
    const Piece& piece = pieces_[i];
    copy_bytes(piece.parameter, piece.shadow, piece.size_bytes);
    copy_fence();
  });
  return {};
}

Result<void> Shadow::exchange() {
  if (threads_ == nullptr) return exchange_on_device();
  threads_->run(pieces_.size(), [this](size_t i) {
    const Piece& piece = pieces_[i];
    exchange_bytes(piece.parameter, piece.shadow, piece.size_bytes);
  });
  return {};
}

// As many pieces at a time as the held memory takes.
Result<void> Shadow::exchange_on_device() {
  const std::span<std::byte> held = held_->bytes();
  std::vector<StridedCopy> out;
  std::vector<StridedCopy> in;
  std::vector<StridedCopy> back;
  uint64_t used = 0;
  const auto flush = [&]() -> Result<void> {
    for (auto* copies : {&out, &in, &back}) {
      TRANSFUSE_RETURN_IF_ERROR(run_on_device(transport_, *copies, {}));
      copies->clear();
    }
    used = 0;
    return {};
  };
  for (const Piece& piece : pieces_) {
    if (used + piece.size_bytes > held.size()) TRANSFUSE_RETURN_IF_ERROR(flush());
    add_plain(out, held.data() + used, piece.parameter, piece.size_bytes);
    add_plain(in, piece.parameter, piece.shadow, piece.size_bytes);
    add_plain(back, piece.shadow, held.data() + used, piece.size_bytes);
    used += aligned(piece.size_bytes);
    used = std::min<uint64_t>(used, held.size());
  }
  return flush();
}

}  // namespace transfuse
