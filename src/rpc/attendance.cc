// One bidirectional stream, kept open as long as its client lives.
#include "rpc/attendance.h"

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "rpc/convert.h"
#include "rpc/protocol.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr int64_t kGoodbyeMs = 200;

}  // namespace

Attendance::Attendance(wire::Coordinator::Stub& stub, const std::string& token,
                       const wire::Beat& first, std::function<void()> wake)
    : wake_(std::move(wake)) {
  if (!token.empty()) context_.AddMetadata(kTokenKey, token);
  stub.async()->Attend(&context_, this);
  AddHold();
  const MutexLock lock(mutex_);
  outgoing_ = first;
  writing_ = true;
  StartWrite(&outgoing_);
  StartRead(&incoming_);
  StartCall();
}

Attendance::~Attendance() {
  const MutexLock lock(mutex_);
  TRANSFUSE_CHECK(done_);
}

Result<void> Attendance::wait_for_welcome(Deadline deadline) {
  const MutexLock lock(mutex_);
  while (!welcome_ && !done_ && !deadline.passed()) changed_.wait_until(mutex_, deadline);
  if (welcome_) return {};
  if (done_) return to_error(status_, "attending");
  return Error{ErrorCode::kDeadlineExceeded, "the coordinator did not answer the first beat"};
}

void Attendance::beat(const wire::Beat& beat) {
  const MutexLock lock(mutex_);
  if (writing_ || !held_ || broken_) return;
  outgoing_ = beat;
  writing_ = true;
  StartWrite(&outgoing_);
}

bool Attendance::broken() {
  const MutexLock lock(mutex_);
  return broken_;
}

std::vector<wire::Notice> Attendance::take() {
  const MutexLock lock(mutex_);
  return std::exchange(notices_, {});
}

void Attendance::close(const wire::Beat& last) {
  const MutexLock lock(mutex_);
  const Deadline goodbye = Deadline::after_ms(kGoodbyeMs);
  while (writing_ && !broken_ && !goodbye.passed()) changed_.wait_until(mutex_, goodbye);
  if (!writing_ && held_ && !broken_) {
    outgoing_ = last;
    writing_ = true;
    StartWriteLast(&outgoing_, grpc::WriteOptions());
    while (!broken_ && !goodbye.passed()) changed_.wait_until(mutex_, goodbye);
  }
  context_.TryCancel();
  let_go();
  // Needs no peer: a cancelled call ends by itself.
  while (!done_) changed_.wait(mutex_);
}

void Attendance::let_go() {
  if (held_) RemoveHold();
  held_ = false;
}

void Attendance::OnReadDone(bool ok) {
  {
    const MutexLock lock(mutex_);
    if (ok) {
      welcome_ = welcome_ || incoming_.welcome();
      notices_.push_back(std::move(incoming_));
      incoming_.Clear();
      StartRead(&incoming_);
    } else {
      broken_ = true;
      let_go();
    }
    changed_.notify_all();
  }
  wake_();
}

void Attendance::OnWriteDone(bool /*ok*/) {  // a failed write shows as a failed read, too
  const MutexLock lock(mutex_);
  writing_ = false;
  changed_.notify_all();
}

void Attendance::OnDone(const grpc::Status& status) {
  const MutexLock lock(mutex_);
  broken_ = true;
  done_ = true;
  status_ = status;
  changed_.notify_all();
}

}  // namespace transfuse
