// The test program, and what it is when it starts itself: `serve ...` a coordinator, `member
// TTL_MS` a member that takes commands from standard input.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <utility>

#include "rpc/member_process.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"

namespace transfuse {
namespace {

int run_serve(int argc, char** argv) {
  ServeOptions options;
  for (int i = 2; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--detach") {
      options.detach = true;
      continue;
    }
    const std::string value = i + 1 < argc ? argv[++i] : "";
    if (name == "--ready-fd") options.ready_fd = std::stoi(value);
    if (name == "--embedded") options.embedded_folder = value;
    if (name == "--job") options.job = value;
    if (name == "--idle-exit-ms") options.idle_exit_ms = std::stoll(value);
    if (name == "--socket") options.socket = value;
    if (name == "--tcp") options.tcp = value;
    if (name == "--token-file") options.token_file = value;
  }
  options.on_ready = [](const CoordinatorInfo& info) {
    std::printf("%s\n", info.address.c_str());
    std::fflush(stdout);
  };
  const auto served = serve(options);
  if (served) return 0;
  std::printf("%s\n", served.error().to_string().c_str());
  return 1;
}

// Commands and answers are one line each.
class MemberShell {
 public:
  explicit MemberShell(std::unique_ptr<Control> control) : control_(std::move(control)) {}

  std::string run(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "join") {
      std::string role, name;
      uint32_t count = 1;
      uint32_t group_size = 0;
      words >> role >> name >> count >> group_size;
      auto joined = join_as(*control_, role == "source" ? MemberRole::kSource : MemberRole::kTarget,
                            name, count, 0, group_size);
      if (!joined) return joined.error().to_string();
      self_ = *joined;
      return "ok";
    }
    uint64_t number = 0;
    words >> number;
    if (command == "write") return said(write_version(*control_, self_, number));
    if (command == "begin") {
      auto drained = control_->begin_write(self_, in_place(number), Deadline::after_ms(20000));
      return drained ? "ok " + std::to_string(drained->revoked) : drained.error().to_string();
    }
    if (command == "publish") {
      return said(control_->publish(self_, offer(number)));
    }
    if (command == "acquire") {
      auto lease = control_->acquire(self_, {VersionRequest::Kind::kAtLeast, number},
                                     Deadline::after_ms(20000));
      if (!lease) return lease.error().to_string();
      lease_ = lease->id;
      round_ = lease->round;
      return "ok " + std::to_string(lease->version);
    }
    if (command == "release" || command == "staged") {
      const LeaseEnd end = command == "staged" ? LeaseEnd::kUnchanged : LeaseEnd::kLanded;
      return said(control_->release(lease_, {end}, Deadline::after_ms(5000)));
    }
    if (command == "vote") {
      return said(control_->vote(self_, round_, number != 0, "told to", Deadline::after_ms(20000)));
    }
    if (command == "decide") {
      const auto decision = control_->decision(self_, round_, Deadline::after_ms(20000));
      if (!decision) return decision.error().to_string();
      return decision->commit ? "commit" : "abort: " + decision->reason;
    }
    if (command == "apply") {
      return said(control_->applied(self_, round_, number, Deadline::after_ms(20000)));
    }
    return "unknown command";
  }

 private:
  static std::string said(const Result<void>& result) {
    return result ? "ok" : result.error().to_string();
  }
  std::unique_ptr<Control> control_;
  MemberId self_{};
  LeaseId lease_{};
  uint64_t round_ = 0;
};

int run_member(int64_t ttl_ms) {
  ConnectOptions options;
  options.runtime_folder = std::getenv("TRANSFUSE_TEST_FOLDER");
  options.job = "test";
  options.control.call_deadline_ms = 20000;
  options.control.heartbeat_ms = 100;
  options.control.member_ttl_ms = ttl_ms;
  auto control = connect_control(options);
  std::printf("%s\n", control ? "ok" : control.error().to_string().c_str());
  std::fflush(stdout);
  if (!control) return 1;
  const auto found = find_coordinator(options);
  MemberShell shell(std::move(*control));
  std::string line;
  while (std::getline(std::cin, line)) {
    const std::string answer =
        line == "coordinator" ? (found ? std::to_string(found->pid) : found.error().to_string())
                              : shell.run(line);
    std::printf("%s\n", answer.c_str());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace transfuse

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "serve") return transfuse::run_serve(argc, argv);
  if (mode == "member") return transfuse::run_member(std::stoll(argv[2]));
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
