// One session per job in this process, found again by its options.
#include "session.h"

#include <unistd.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "transfuse/control.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::python {
namespace {

// Where the sockets of this user's jobs lie, and those of their coordinators.
Result<std::string> open_runtime_folder(const std::string& job) {
  TRANSFUSE_ASSIGN_OR_RETURN(const RuntimePaths paths, runtime_paths("", job));
  TRANSFUSE_RETURN_IF_ERROR(prepare_folder(paths.folder));
  return paths.folder;
}

// Sessions that are alive, by process, job and device: a forked child finds none of its parent's.
using SessionKey = std::tuple<pid_t, std::string, std::optional<int>>;
std::mutex open_mutex;
std::map<SessionKey, std::weak_ptr<Session>>& open_sessions() {
  static std::map<SessionKey, std::weak_ptr<Session>> sessions;
  return sessions;
}

template <typename T>
Result<void> check_same(const std::string& job, const char* option, const std::optional<T>& wanted,
                        const T& found) {
  if (!wanted || *wanted == found) return {};
  return Error{ErrorCode::kInvalidArgument,
               "this process has job '" + job + "' open with another value of '" + option + "'"};
}

#ifdef TRANSFUSE_CUDA
Result<std::unique_ptr<Transport>> on_device(std::unique_ptr<Transport> host, int device) {
  auto transport = open_cuda_transport(std::move(host), device);
  if (transport) return transport;
  const Error& error = transport.error();
  return Error{error.code, device_name(device) + ": " + error.message};
}
#else
Result<std::unique_ptr<Transport>> on_device(const std::unique_ptr<Transport>&, int device) {
  return Error{ErrorCode::kUnsupported,
               device_name(device) +
                   ": this build of Transfuse has no GPU support (it was made without nvcc of CUDA "
                   "13 or later, or with TRANSFUSE_CUDA=OFF); weights in memory of the host work"};
}
#endif

}  // namespace

std::string device_name(int ordinal) { return "cuda:" + std::to_string(ordinal); }

Result<std::shared_ptr<Session>> Session::open(const SessionOptions& options) {
  const std::lock_guard lock(open_mutex);
  auto& known = open_sessions()[{getpid(), options.job, options.device}];
  if (auto session = known.lock()) {
    TRANSFUSE_RETURN_IF_ERROR(session->join(options));
    return session;
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string folder, open_runtime_folder(options.job));
  TransportOptions transport_options;
  transport_options.threads = options.threads.value_or(0);
  transport_options.allow_any_tracer = options.allow_any_tracer.value_or(false);
  TRANSFUSE_ASSIGN_OR_RETURN(auto transport, open_shm_transport(folder, transport_options));
  if (options.device) {
    TRANSFUSE_ASSIGN_OR_RETURN(transport, on_device(std::move(transport), *options.device));
  }
  std::shared_ptr<Session> session(new Session(options, std::move(transport)));
  known = session;
  return session;
}

Session::Session(const SessionOptions& options, std::unique_ptr<Transport> transport)
    : job_(options.job),
      threads_(options.threads.value_or(0)),
      allow_any_tracer_(options.allow_any_tracer.value_or(false)),
      device_(options.device),
      owner_pid_(getpid()),
      transport_(std::move(transport)),
      address_(options.address),
      token_(options.token) {}

Result<void> Session::join(const SessionOptions& options) {
  const std::lock_guard lock(mutex_);
  TRANSFUSE_RETURN_IF_ERROR(check_same(job_, "threads", options.threads, threads_));
  TRANSFUSE_RETURN_IF_ERROR(
      check_same(job_, "allow_any_tracer", options.allow_any_tracer, allow_any_tracer_));
  if (control_ == nullptr) {  // nobody has asked for it so far
    if (!address_) address_ = options.address;
    if (!token_) token_ = options.token;
  }
  TRANSFUSE_RETURN_IF_ERROR(check_same(job_, "token", options.token, token_.value_or("")));
  return check_same(job_, "address", options.address, address_.value_or(""));
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
    ConnectOptions options;
    options.address = address_.value_or("");
    options.token = token_.value_or("");
    options.job = job_;
    TRANSFUSE_ASSIGN_OR_RETURN(control_, connect_control(options));
  }
  return control_.get();
}

Result<std::shared_ptr<ArenaMemory>> Session::allocate(uint64_t size_bytes) {
  TRANSFUSE_ASSIGN_OR_RETURN(auto region, device_ ? transport_->allocate_on_device(size_bytes)
                                                  : transport_->allocate(size_bytes));
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
