// One session per job in this process, found again by its options.
#include "session.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "transfuse/control.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::python {
namespace {

// Every process has a coordinator of its own for now.
Result<std::unique_ptr<Control>> open_control() { return open_local_control(); }

Result<std::string> runtime_folder() {
  const std::string path = "/tmp/transfuse-" + std::to_string(getuid());
  if (mkdir(path.c_str(), S_IRWXU) != 0 && errno != EEXIST) {
    return Error{ErrorCode::kPermissionDenied, "cannot make " + path};
  }
  return path;
}

//  Sessions that are alive, by process and job: a forked child finds none of its parent's.
std::mutex open_mutex;
std::map<std::pair<pid_t, std::string>, std::weak_ptr<Session>>& open_sessions() {
  static std::map<std::pair<pid_t, std::string>, std::weak_ptr<Session>> sessions;
  return sessions;
}

template <typename T>
Result<void> check_same(const std::string& job, const char* option, const std::optional<T>& wanted,
                        const T& found) {
  if (!wanted || *wanted == found) return {};
  return Error{ErrorCode::kInvalidArgument,
               "this process has job '" + job + "' open with another value of '" + option + "'"};
}

}  // namespace

Result<std::shared_ptr<Session>> Session::open(const SessionOptions& options) {
  const std::lock_guard lock(open_mutex);
  auto& known = open_sessions()[{getpid(), options.job}];
  if (auto session = known.lock()) {
    TRANSFUSE_RETURN_IF_ERROR(session->join(options));
    return session;
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string folder, runtime_folder());
  TransportOptions transport_options;
  transport_options.threads = options.threads.value_or(0);
  transport_options.allow_any_tracer = options.allow_any_tracer.value_or(false);
  TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(folder, transport_options));
  std::shared_ptr<Session> session(new Session(options, std::move(transport)));
  known = session;
  return session;
}

Session::Session(const SessionOptions& options, std::unique_ptr<Transport> transport)
    : job_(options.job),
      threads_(options.threads.value_or(0)),
      allow_any_tracer_(options.allow_any_tracer.value_or(false)),
      owner_pid_(getpid()),
      transport_(std::move(transport)),
      address_(options.address) {}

Result<void> Session::join(const SessionOptions& options) {
  const std::lock_guard lock(mutex_);
  TRANSFUSE_RETURN_IF_ERROR(check_same(job_, "threads", options.threads, threads_));
  TRANSFUSE_RETURN_IF_ERROR(
      check_same(job_, "allow_any_tracer", options.allow_any_tracer, allow_any_tracer_));
  if (address_) return check_same(job_, "address", options.address, *address_);
  if (control_ != nullptr) return check_same(job_, "address", options.address, std::string());
  address_ = options.address;
  return {};
}

Session::~Session() {
  if (getpid() == owner_pid_) return;
  // Their threads do not exist in a forked child.
  static_cast<void>(control_.release());
  static_cast<void>(transport_.release());
}

Result<Control*> Session::control() {
  const std::lock_guard lock(mutex_);
  if (control_ == nullptr) {
    TRANSFUSE_ASSIGN_OR_RETURN(control_, open_control());
  }
  return control_.get();
}

Result<std::shared_ptr<ArenaMemory>> Session::allocate(uint64_t size_bytes) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto region, transport_->allocate(size_bytes));
  auto arena = std::make_shared<ArenaMemory>();
  arena->session = shared_from_this();
  arena->region = std::move(region);
  const std::lock_guard lock(mutex_);
  std::erase_if(arenas_, [](const auto& known) { return known.expired(); });
  arenas_.push_back(arena);
  return arena;
}

std::vector<std::shared_ptr<ArenaMemory>> Session::arenas() {
  std::vector<std::shared_ptr<ArenaMemory>> alive;
  const std::lock_guard lock(mutex_);
  for (const auto& known : arenas_) {
    if (auto arena = known.lock()) alive.push_back(std::move(arena));
  }
  return alive;
}

}  // namespace transfuse::python
