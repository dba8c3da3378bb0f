// Pieces of parameters, copied and exchanged past the caches.
#include "session/shadow.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "base/affinity.h"
#include "base/memory_room.h"
#include "copy/copy.h"
#include "session/copy_threads.h"
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
  std::unique_ptr<Shadow> shadow(new Shadow());
  const uint64_t needed = shadow_bytes(layout);
  if (const MemoryRoom room = memory_room(); needed > room.size_bytes) {
    return Error{ErrorCode::kResourceExhausted,
                 fmt::format("the shadow of receiver '{}' needs {} bytes, {} leaves {}: receive in "
                             "place, which needs none",
                             options.name, needed, room.limit, room.size_bytes)};
  }
  TRANSFUSE_ASSIGN_OR_RETURN(shadow->region_, transport.allocate(needed));
  TRANSFUSE_ASSIGN_OR_RETURN(shadow->threads_, CopyThreads::open(usable_core_count()));
  std::byte* at = shadow->region_->bytes().data();
  for (uint32_t i = 0; i < layout.parameters().size(); ++i) {
    const uint64_t size = parameter_size_bytes(layout.parameters()[i]);
    shadow->data_.push_back(at);
    for (uint64_t done = 0; done < size; done += kPieceBytes) {
      shadow->pieces_.push_back({.shadow = at + done,
                                 .parameter = parameters.data(i) + done,
                                 .size_bytes = std::min(kPieceBytes, size - done)});
    }
    at += aligned(size);
  }
  return shadow;
}

void Shadow::copy_to_parameters() {
  threads_->run(pieces_.size(), [this](size_t i) {
    const Piece& piece = pieces_[i];
    copy_bytes(piece.parameter, piece.shadow, piece.size_bytes);
    copy_fence();
  });
}

void Shadow::exchange() {
  threads_->run(pieces_.size(), [this](size_t i) {
    const Piece& piece = pieces_[i];
    exchange_bytes(piece.parameter, piece.shadow, piece.size_bytes);
  });
}

}  // namespace transfuse
