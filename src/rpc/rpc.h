// The coordinator for programs: connect to it, be it, ask it. No gRPC type in sight.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "transfuse/control.h"
#include "transfuse/result.h"

namespace transfuse {

struct ConnectOptions {
  // "unix:/path/to/socket" or "host:port". "": $TRANSFUSE_COORDINATOR, and if that is not set, the
  // embedded coordinator of this user and job, which is started where it does not run.
  std::string address;
  std::string token;  // what a coordinator with a token file asks for

  // -- embedded only --
  std::string job;             // "": $TRANSFUSE_JOB or "default"
  std::string runtime_folder;  // "": $XDG_RUNTIME_DIR/transfuse or /tmp/transfuse-<uid>
  // The program that is run as `<program> serve ...`: $TRANSFUSE_SERVE_COMMAND, else this, else
  // `transfuse` or `bin/transfuse` beside this library or program, else `transfuse` in $PATH.
  std::string serve_command;
  int64_t idle_exit_ms = 10000;  // of a coordinator that is started

  ControlOptions control;
};

// Fails with kUnavailable (nobody there, or it cannot be started), kDeadlineExceeded (it does not
// answer), kPermissionDenied (token, or a run-time folder of somebody else), kUnsupported (another
// protocol), kNotFound (no program to start). The handle reconnects, starts the embedded
// coordinator again, and repeats its registrations and its published version by itself.
Result<std::unique_ptr<Control>> connect_control(const ConnectOptions& options = {});

// The private folder of this user where sockets of members lie: ConnectOptions::runtime_folder or
// its default. Made (0700) if it is missing. kPermissionDenied: it is somebody else's, or open.
Result<std::string> open_runtime_folder(const std::string& runtime_folder = "");

struct CoordinatorInfo {
  std::string address;
  uint64_t epoch = 0;  // rises with every start
  uint32_t pid = 0;
};
// Never starts one: kNotFound where none runs.
Result<CoordinatorInfo> find_coordinator(const ConnectOptions& options = {});

struct ServeOptions {
  std::string socket;      // path of a unix socket, 0600
  std::string tcp;         // "127.0.0.1:0": any free port. Beyond loopback a token file is demanded
  std::string token_file;  // its first line is what every call must carry
  int64_t idle_exit_ms = 0;  // ends after so long without members and connections; 0: never
  std::function<void(const CoordinatorInfo&)> on_ready;

  // -- how a member starts the embedded one --
  std::string embedded_folder;  // with `job` instead of `socket`
  std::string job;
  bool detach = false;  // the process goes on in the background, in a session of its own
  int ready_fd = -1;    // gets one byte when the socket listens
};

// Serves until SIGINT, SIGTERM or idle_exit_ms; removes its socket. For a process whose main job
// this is: it takes over signals, and with `detach` forks. kAlreadyExists: another one listens.
Result<void> serve(const ServeOptions& options);

}  // namespace transfuse
