// A client's presence at the coordinator: the stream of its beats and of what its members are told.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/support/client_callback.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/mutex.h"
#include "transfuse.grpc.pb.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

// Safe to call from any thread; `wake` is called on gRPC's threads, and never after close().
class Attendance final : public grpc::ClientBidiReactor<wire::Beat, wire::Notice> {
 public:
  Attendance(wire::Coordinator::Stub& stub, const std::string& token, const wire::Beat& first,
             std::function<void()> wake);
  ~Attendance() override;  // close() first

  // Waits for the coordinator's answer to the first beat.
  Result<void> wait_for_welcome(Deadline deadline);
  // Dropped while the one before has not left: the next is soon due.
  void beat(const wire::Beat& beat);
  bool broken();
  std::vector<wire::Notice> take();
  // Sends `last`, gives the coordinator a moment to end the stream, then ends it.
  void close(const wire::Beat& last);

  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  void let_go() REQUIRES(mutex_);

  grpc::ClientContext context_;
  const std::function<void()> wake_;
  Mutex mutex_;
  CondVar changed_;
  wire::Notice incoming_;  // belongs to gRPC while it reads
  wire::Beat outgoing_ GUARDED_BY(mutex_);
  std::vector<wire::Notice> notices_ GUARDED_BY(mutex_);
  bool writing_ GUARDED_BY(mutex_) = false;
  bool welcome_ GUARDED_BY(mutex_) = false;
  bool held_ GUARDED_BY(mutex_) = true;  // writes come from outside of reactions
  bool broken_ GUARDED_BY(mutex_) = false;
  bool done_ GUARDED_BY(mutex_) = false;
  grpc::Status status_ GUARDED_BY(mutex_);
};

}  // namespace transfuse
