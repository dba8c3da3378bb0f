// One batch a stream and leg.
#include "transport/cuda/engine_pieces.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "transfuse/result.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::cuda {
namespace {

// A leg of 64 MiB is summed in 20 us by an H200.
constexpr uint64_t kLastLegBytes = uint64_t{64} << 20;

// How many of `pieces` are the next leg.
size_t leg_length(std::span<const EnginePiece> pieces) {
  uint64_t left = 0;
  for (const EnginePiece& piece : pieces) left += piece.size_bytes;
  if (left <= kLastLegBytes) return pieces.size();
  uint64_t taken = 0;
  size_t count = 0;
  while (taken < left / 4 * 3) taken += pieces[count++].size_bytes;
  return count;
}

}  // namespace

Result<EnginePieces> EnginePieces::make(const Device& device, std::vector<EnginePiece> pieces,
                                        bool legs) {
  EnginePieces made;
  if (pieces.empty()) return made;
  made.device_ = &device;
  TRANSFUSE_ASSIGN_OR_RETURN(made.begin_, Event::create(device, EventKind::kOrder));
  for (Stream& stream : made.streams_) {
    TRANSFUSE_ASSIGN_OR_RETURN(stream, Stream::create(device));
  }
  // Dealt to the streams longest first: they end at about the same time.
  std::ranges::sort(pieces, [](const EnginePiece& a, const EnginePiece& b) {
    return a.size_bytes != b.size_bytes ? a.size_bytes > b.size_bytes : a.copy < b.copy;
  });
  const std::span<const EnginePiece> all = pieces;
  for (size_t begin = 0; begin < all.size();) {
    Leg& leg = made.legs_.emplace_back();
    leg.begin = begin;
    leg.end = legs ? begin + leg_length(all.subspan(begin)) : all.size();
    for (size_t k = 0; k < kStreams; ++k) {
      // Stream k takes pieces k, k + 4, ... of all.
      const size_t first = begin + (k + kStreams - begin % kStreams) % kStreams;
      for (size_t i = first; i < leg.end; i += kStreams) made.pieces_.push_back(all[i]);
      leg.count[k] = first < leg.end ? (leg.end - first + kStreams - 1) / kStreams : 0;
      TRANSFUSE_ASSIGN_OR_RETURN(leg.ends[k], Event::create(device, EventKind::kOrder));
    }
    begin = leg.end;
  }
  for (const EnginePiece& piece : made.pieces_) {
    made.targets_.push_back(piece.target);
    made.sizes_.push_back(piece.size_bytes);
  }
  made.sources_.resize(made.pieces_.size());
  return made;
}

std::span<const EnginePiece> EnginePieces::leg(size_t number) const {
  const Leg& leg = legs_[number];
  return std::span(pieces_).subspan(leg.begin, leg.end - leg.begin);
}

void EnginePieces::set_bases(std::span<const CUdeviceptr> bases) {
  for (size_t i = 0; i < pieces_.size(); ++i) {
    sources_[i] = bases[pieces_[i].source] + pieces_[i].source_offset;
  }
}

Result<void> EnginePieces::come_after(CUstream stream) {
  const Driver& driver = device_->driver();
  TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, begin_.get(), stream));
  for (const Stream& own : streams_) {
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(driver, cuStreamWaitEvent, own.get(), begin_.get(), 0));
  }
  return {};
}

Result<void> EnginePieces::launch(size_t leg) {
  const Driver& driver = device_->driver();
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t attribute_begin = 0;
  const Leg& now = legs_[leg];
  size_t first = now.begin;
  // The copy engines do not serve streams evenly: a leg would be complete when nearly all is.
  if (leg > 0) {
    for (const Stream& own : streams_) TRANSFUSE_RETURN_IF_ERROR(let_follow(own.get(), leg - 1));
  }
  for (size_t k = 0; k < kStreams; ++k) {
    const CUstream own = streams_[k].get();
    if (now.count[k] > 0) {
      TRANSFUSE_RETURN_IF_ERROR(driver.check(
          driver.batch_copy(targets_.data() + first, sources_.data() + first, sizes_.data() + first,
                            now.count[k], &attributes, &attribute_begin, 1, own),
          "cuMemcpyBatchAsync"));
    }
    first += now.count[k];
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(driver, cuEventRecord, now.ends[k].get(), own));
  }
  return {};
}

Result<void> EnginePieces::let_follow(CUstream stream, size_t leg) {
  for (const Event& end : legs_[leg].ends) {
    TRANSFUSE_RETURN_IF_ERROR(
        TRANSFUSE_CUDA(device_->driver(), cuStreamWaitEvent, stream, end.get(), 0));
  }
  return {};
}

void EnginePieces::wait() {
  if (empty()) return;
  for (const Stream& stream : streams_) {
    (void)device_->driver().cuStreamSynchronize(stream.get());
  }
}

}  // namespace transfuse::cuda
