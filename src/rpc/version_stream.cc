// One server stream per watch; the newest state of every version waits here until it is taken.
#include "rpc/version_stream.h"

#include <fmt/format.h>
#include <grpcpp/support/client_callback.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "rpc/connection.h"
#include "rpc/convert.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr size_t kMaxPending = 256;  // more than the coordinator remembers of a model

bool same_version(const VersionInfo& a, const VersionInfo& b) {
  return a.version == b.version && a.model == b.model;
}

// Safe to call from any thread; close() before the end.
class VersionStream final : public grpc::ClientReadReactor<wire::Version> {
 public:
  VersionStream(Connection& connection, std::shared_ptr<Link> link, const std::string& model)
      : link_(std::move(link)) {
    connection.prepare(context_, std::nullopt);
    request_.set_model(model);
    link_->stub->async()->Watch(&context_, &request_, this);
    StartRead(&incoming_);
    StartCall();
  }

  // What comes next; nothing at the deadline or if the stream has ended.
  std::optional<Result<VersionInfo>> next(Deadline deadline) {
    const MutexLock lock(mutex_);
    while (pending_.empty() && !done_ && !deadline.passed()) changed_.wait_until(mutex_, deadline);
    if (pending_.empty()) return std::nullopt;
    auto version = std::move(pending_.front());
    pending_.pop_front();
    return version;
  }
  // Its status, if it has ended and everything was taken.
  std::optional<grpc::Status> ended() {
    const MutexLock lock(mutex_);
    if (!done_ || !pending_.empty()) return std::nullopt;
    return status_;
  }
  const Link& link() const { return *link_; }
  void close() {
    context_.TryCancel();
    const MutexLock lock(mutex_);
    while (!done_) changed_.wait(mutex_);  // needs no peer: a cancelled call ends by itself
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;  // OnDone() follows
    {
      const MutexLock lock(mutex_);
      auto version = from_wire(incoming_);
      if (version) {
        std::erase_if(pending_, [&](const Result<VersionInfo>& other) {
          return other && same_version(*other, *version);
        });
      }
      if (pending_.size() >= kMaxPending) pending_.pop_front();
      pending_.push_back(std::move(version));
      changed_.notify_all();
    }
    StartRead(&incoming_);
  }
  void OnDone(const grpc::Status& status) override {
    const MutexLock lock(mutex_);
    done_ = true;
    status_ = status;
    changed_.notify_all();
  }

 private:
  const std::shared_ptr<Link> link_;  // its channel lives as long as the call
  grpc::ClientContext context_;
  wire::ModelRequest request_;
  wire::Version incoming_;  // belongs to gRPC while it reads
  Mutex mutex_;
  CondVar changed_;
  std::deque<Result<VersionInfo>> pending_ GUARDED_BY(mutex_);
  bool done_ GUARDED_BY(mutex_) = false;
  grpc::Status status_ GUARDED_BY(mutex_);
};

// Used from one thread.
class RpcWatch final : public Watch {
 public:
  RpcWatch(std::shared_ptr<Connection> connection, std::string_view model)
      : connection_(std::move(connection)), model_(model) {}
  ~RpcWatch() override {
    if (connection_->in_owner_process()) {
      end_stream();
    } else {
      (void)stream_.release();  // deliberately leaked, as the connection in a forked child
      new std::shared_ptr<Connection>(std::move(connection_));
    }
  }

  Result<void> open() {
    TRANSFUSE_ASSIGN_OR_RETURN(
        auto link, connection_->ready("watch", std::nullopt, connection_->default_deadline()));
    stream_ = std::make_unique<VersionStream>(*connection_, std::move(link), model_);
    return {};
  }

  Result<std::optional<VersionInfo>> next(Deadline deadline) override {
    TRANSFUSE_RETURN_IF_ERROR(connection_->check_process());
    while (true) {
      if (!stream_) {
        auto link = connection_->ready("watch", std::nullopt, deadline);
        if (!link) {
          if (deadline.passed()) return std::optional<VersionInfo>();
          return Unexpected{std::move(link).error()};
        }
        stream_ = std::make_unique<VersionStream>(*connection_, std::move(*link), model_);
      }
      if (auto version = stream_->next(deadline)) {
        if (!*version) return Unexpected{std::move(*version).error()};
        if (!fresh(**version)) continue;
        return std::optional<VersionInfo>(std::move(**version));
      }
      if (const auto status = stream_->ended()) {
        if (from_coordinator(*status)) return to_error(*status, "watch");
        connection_->link_broke(stream_->link(), "watch: " + status->error_message());
        end_stream();
      }
      if (deadline.passed()) return std::optional<VersionInfo>();
    }
  }

 private:
  // False for what a stream that was opened again repeats.
  bool fresh(const VersionInfo& version) {
    const auto key = std::pair(version.model, version.version);
    const auto found = seen_.find(key);
    if (found != seen_.end() && found->second == version.state) return false;
    if (seen_.size() >= kMaxPending) seen_.erase(seen_.begin());
    seen_[key] = version.state;
    return true;
  }
  void end_stream() {
    if (stream_) stream_->close();
    stream_.reset();
  }

  std::shared_ptr<Connection> connection_;  // shared with the control handle
  const std::string model_;
  std::unique_ptr<VersionStream> stream_;
  std::map<std::pair<std::string, uint64_t>, VersionState> seen_;
};

}  // namespace

Result<std::unique_ptr<Watch>> open_watch(std::shared_ptr<Connection> connection,
                                          std::string_view model) {
  auto watch = std::make_unique<RpcWatch>(std::move(connection), model);
  TRANSFUSE_RETURN_IF_ERROR(watch->open());
  return std::unique_ptr<Watch>(std::move(watch));
}

}  // namespace transfuse
