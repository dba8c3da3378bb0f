// The door: counts reads of one kind and holds the one that is due.
#include "faults/gated_transport.h"

#include <utility>

namespace transfuse::faults {

GatedTransport::GatedTransport(std::unique_ptr<Transport> inner, std::function<void()> on_held)
    : inner_(std::move(inner)), on_held_(std::move(on_held)) {}

void GatedTransport::hold(ReadKind kind, uint64_t number) {
  const MutexLock lock(mutex_);
  kind_ = kind;
  until_held_ = number;
  open_ = false;
}

void GatedTransport::open() {
  const MutexLock lock(mutex_);
  until_held_ = 0;
  open_ = true;
  opened_.notify_all();
}

void GatedTransport::pass(ReadKind kind) {
  {
    const MutexLock lock(mutex_);
    if (until_held_ == 0 || kind != kind_ || --until_held_ > 0) return;
  }
  on_held_();
  const MutexLock lock(mutex_);
  while (!open_) opened_.wait(mutex_);
}

Result<TicketId> GatedTransport::submit(const ReadRequest& request) {
  const bool words = request.copies.size() == 1 && request.copies[0].op == ElementOp::kCopy8;
  pass(words ? ReadKind::kWords : ReadKind::kWeights);
  return inner_->submit(request);
}

}  // namespace transfuse::faults
