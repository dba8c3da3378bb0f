// The process that is the coordinator: listens, waits for a signal or for idleness, cleans up.
#include <fcntl.h>
#include <fmt/format.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <ios>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/log.h"
#include "base/random.h"
#include "base/unique_fd.h"
#include "rpc/protocol.h"
#include "rpc/rpc.h"
#include "rpc/runtime_folder.h"
#include "rpc/service.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"

namespace transfuse {

namespace {

constexpr int kFirstInheritedFd = 4;
constexpr off_t kMaxLogBytes = 1 << 20;
constexpr int64_t kSignalPeriodMs = 200;
constexpr int64_t kShutdownMs = 1000;
constexpr int64_t kLockMs = 5000;

std::string reason() { return std::strerror(errno); }

bool is_loopback(std::string_view address) {
  const std::string_view host = address.substr(0, address.rfind(':'));
  return host == "localhost" || host == "[::1]" || host.starts_with("127.");
}

Result<std::string> read_token(const ServeOptions& options) {
  if (options.token_file.empty()) {
    if (options.tcp.empty() || is_loopback(options.tcp)) return std::string();
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("{} can be reached from other hosts: a token file is needed, so that "
                             "not everybody there is served",
                             options.tcp)};
  }
  struct stat found{};
  if (::stat(options.token_file.c_str(), &found) != 0) {
    return Error{ErrorCode::kNotFound,
                 fmt::format("token file {}: {}", options.token_file, reason())};
  }
  if ((found.st_mode & 077) != 0) {
    return Error{ErrorCode::kPermissionDenied,
                 fmt::format("token file {} has mode {:04o}, others can read it: chmod 600",
                             options.token_file, found.st_mode & 07777)};
  }
  std::string token;
  std::ifstream file(options.token_file);
  std::getline(file, token);
  if (token.size() >= 16) return token;
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("the first line of token file {} has {} bytes, at least 16 are expected",
                           options.token_file, token.size())};
}

// Goes on as a child in a session of its own, with nothing of the caller's but standard streams and
// the fd that tells it is ready. Before any thread.
Result<void> go_to_background() {
  const pid_t child = ::fork();
  if (child < 0) {
    return Error{ErrorCode::kResourceExhausted, fmt::format("cannot fork: {}", reason())};
  }
  if (child > 0) _exit(0);
  ::setsid();
  if (::chdir("/") != 0) {
    return Error{ErrorCode::kUnavailable, fmt::format("cannot leave the folder: {}", reason())};
  }
  ::close_range(kFirstInheritedFd, ~0u, 0);
  ::setenv("TRANSFUSE_LOG", "info", 0);
  return {};
}

// Rises with every start: by the wall clock, and by what the last coordinator of the folder noted.
uint64_t next_epoch(const std::string& path) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  auto epoch = static_cast<uint64_t>(now / std::chrono::milliseconds(1));
  if (path.empty()) return epoch;
  std::string text;
  if (std::ifstream file(path); file) std::getline(file, text);
  uint64_t last = 0;
  std::from_chars(text.data(), text.data() + text.size(), last);
  epoch = std::max(epoch, last + 1);
  std::ofstream(path, std::ios::trunc) << epoch << "\n";
  return epoch;
}

void bound_log() {
  struct stat log{};
  if (::fstat(STDERR_FILENO, &log) != 0 || !S_ISREG(log.st_mode) || log.st_size <= kMaxLogBytes) {
    return;
  }
  if (::ftruncate(STDERR_FILENO, 0) != 0) {
    log_event(LogLevel::kWarn, "log_not_bounded", {{"reason", reason()}});
  }
}

struct Listening {
  std::unique_ptr<CoordinatorService> service;
  std::unique_ptr<grpc::Server> server;  // declared last: ends before the service
  CoordinatorInfo info;
};

Result<Listening> listen(const ServeOptions& options, const std::string& socket,
                         const std::string& epoch_path) {
  if (!socket.empty() && somebody_listens(socket)) {
    return Error{ErrorCode::kAlreadyExists,
                 fmt::format("a coordinator listens on {} already", socket)};
  }
  Listening out;
  ServiceOptions service;
  TRANSFUSE_ASSIGN_OR_RETURN(service.token, read_token(options));
  service.epoch = next_epoch(epoch_path);
  service.limits.first_id = (random_identity() << 32) | 1;
  out.service = std::make_unique<CoordinatorService>(service);
  out.info.epoch = service.epoch;
  out.info.pid = static_cast<uint32_t>(getpid());

  grpc::ServerBuilder builder;
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two on one port: an error, not a mix
  // A client may ping every few seconds to notice a host that is gone.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 2000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  int port = 0;
  if (!socket.empty()) {
    builder.AddListeningPort("unix:" + socket, grpc::InsecureServerCredentials());
    out.info.address = "unix:" + socket;
  }
  if (!options.tcp.empty()) {
    builder.AddListeningPort(options.tcp, grpc::InsecureServerCredentials(), &port);
  }
  builder.RegisterService(out.service.get());
  const mode_t mask = ::umask(0177);  // the socket is for this user only, from its first moment
  out.server = builder.BuildAndStart();
  ::umask(mask);
  if (!out.server) {
    return Error{
        ErrorCode::kUnavailable,
        fmt::format("cannot listen on {}{}{}: the address is in use, or may not be used", socket,
                    socket.empty() || options.tcp.empty() ? "" : " and ", options.tcp)};
  }
  if (!options.tcp.empty() && socket.empty()) {
    out.info.address = fmt::format("{}:{}", options.tcp.substr(0, options.tcp.rfind(':')), port);
  }
  return out;
}

void tell_starter(int fd, std::string_view text) {
  if (fd < 0) return;
  const UniqueFd ready(fd);
  while (!text.empty()) {
    const ssize_t put = ::write(fd, text.data(), text.size());
    if (put < 0 && errno != EINTR) return;  // the starter has given up
    if (put > 0) text.remove_prefix(static_cast<size_t>(put));
  }
}

// Returns what ended it: the name of a signal, or "idle".
std::string wait_for_end(CoordinatorService& service, const sigset_t& signals,
                         int64_t idle_exit_ms) {
  while (true) {
    const timespec period{.tv_sec = 0, .tv_nsec = kSignalPeriodMs * 1'000'000};
    const int signal = ::sigtimedwait(&signals, nullptr, &period);
    if (signal > 0) return fmt::format("SIG{}", sigabbrev_np(signal));
    bound_log();
    if (idle_exit_ms > 0 && service.idle_for() >= std::chrono::milliseconds(idle_exit_ms)) {
      return "idle";
    }
  }
}

void stop(Listening& listening) {
  listening.service->close();
  listening.server->Shutdown(std::chrono::system_clock::now() +
                             std::chrono::milliseconds(kShutdownMs));
  listening.server->Wait();
}

Result<void> run(const ServeOptions& options, const std::optional<RuntimePaths>& embedded,
                 const sigset_t& signals) {
  const std::string socket = embedded ? embedded->socket : options.socket;
  auto listening = listen(options, socket, embedded ? embedded->epoch : "");
  if (!listening) {
    tell_starter(options.ready_fd, listening.error().to_string());
    return Unexpected{std::move(listening).error()};
  }
  tell_starter(options.ready_fd, "1");
  log_event(LogLevel::kInfo, "serving",
            {{"address", listening->info.address},
             {"epoch", std::to_string(listening->info.epoch)},
             {"pid", std::to_string(listening->info.pid)}});
  if (options.on_ready) options.on_ready(listening->info);
  while (true) {
    const std::string why = wait_for_end(*listening->service, signals, options.idle_exit_ms);
    if (!embedded) {
      stop(*listening);
      return {};
    }
    // Under the lock nobody can start another one, whose socket this shutdown would remove.
    auto lock = FolderLock::take(*embedded, Deadline::after_ms(kLockMs));
    // Somebody else has it: a new member may be on its way. Else the folder is gone, or nobody's
    // any more, and no member will ever come.
    if (!lock && why == "idle" && lock.error().code == ErrorCode::kDeadlineExceeded) continue;
    log_event(LogLevel::kInfo, "ending", {{"why", why}});
    stop(*listening);
    if (lock) lock->remove_files(*embedded);
    return {};
  }
}

}  // namespace

Result<void> serve(const ServeOptions& options) {
  std::optional<RuntimePaths> embedded;
  if (!options.embedded_folder.empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(embedded, runtime_paths(options.embedded_folder, options.job));
  } else if (options.socket.empty() && options.tcp.empty()) {
    return Error{ErrorCode::kInvalidArgument,
                 "nowhere to listen: give a socket path or a TCP address"};
  }
  if (options.socket.size() > max_socket_path_bytes()) {
    return Error{ErrorCode::kInvalidArgument,
                 fmt::format("the socket path {} has {} bytes, a unix socket allows {}",
                             options.socket, options.socket.size(), max_socket_path_bytes())};
  }
  if (options.detach) TRANSFUSE_RETURN_IF_ERROR(go_to_background());
  // Blocked before gRPC makes threads, so that they come to sigtimedwait() and nowhere else.
  sigset_t signals, before;
  sigemptyset(&signals);
  for (const int each : {SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals, each);
  ::pthread_sigmask(SIG_BLOCK, &signals, &before);
  ::signal(SIGPIPE, SIG_IGN);
  auto result = run(options, embedded, signals);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

}  // namespace transfuse
