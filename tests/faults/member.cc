// What a request does, one function each.
#include "faults/member.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <utility>

#include "faults/process_facts.h"
#include "session/stored_weights.h"
#include "transfuse/checkpoint.h"
#include "transfuse/deadline.h"

namespace transfuse::faults {
namespace {

constexpr int kChildSeconds = 20;

Json to_json(const Error& error) {
  return {{"ok", false}, {"code", error_code_name(error.code)}, {"message", error.message}};
}

VersionRequest version_request(const Json& request) {
  const std::string kind = request.value("kind", "newest");
  VersionRequest wanted;
  wanted.version = request.value("version", uint64_t{0});
  if (kind == "exactly") wanted.kind = VersionRequest::Kind::kExactly;
  if (kind == "at_least") wanted.kind = VersionRequest::Kind::kAtLeast;
  return wanted;
}

Deadline deadline_of(const Json& request) {
  return Deadline::after_ms(request.value("deadline_ms", int64_t{5000}));
}

Result<Json> report_answer(const Result<RefitReport>& report) {
  if (!report) return report.error();
  return Json{{"report", Json::parse(report->to_json())}, {"version", report->version}};
}

// What an inert handle answers, by name of the call.
template <typename T>
std::string code_of(const Result<T>& result) {
  return result ? "OK" : std::string(error_code_name(result.error().code));
}

}  // namespace

Member::Member(std::string folder, std::string job, std::function<void(const Json&)> tell)
    : tell_(std::move(tell)) {
  options_.runtime_folder = std::move(folder);
  options_.job = std::move(job);
}

bool Member::interrupt(const Json& request) {
  const std::string call = request.value("do", "");
  GatedTransport* const gate = gate_;
  Receiver* const receiver = cancellable_;
  if (call == "go" && gate != nullptr) gate->open();
  if (call == "cancel" && receiver != nullptr) receiver->cancel();
  return call == "go" || call == "cancel";
}

Json Member::answer(const Json& request) {
  const TimePoint start = std::chrono::steady_clock::now();
  auto result = dispatch(request.value("do", ""), request);
  Json answer = result ? std::move(*result) : to_json(result.error());
  answer["ok"] = result.has_value();
  answer["elapsed_ms"] = std::chrono::duration_cast<std::chrono::milliseconds>(
                             std::chrono::steady_clock::now() - start)
                             .count();
  if (receiver_) answer["holds"] = receiver_->version();
  if (!result && request.value("do", "") == "refit" && receiver_) {
    answer["report"] = Json::parse(receiver_->last_report().to_json());
  }
  return answer;
}

Result<void> Member::require(bool there, const char* what) const {
  if (there) return {};
  return Error{ErrorCode::kInvalidArgument, std::string("this member has no ") + what};
}

Result<Json> Member::dispatch(const std::string& call, const Json& request) {
  if (call == "connect") return connect(request);
  if (call == "drop_ptrace_right" || call == "hide_memory") {
    TRANSFUSE_RETURN_IF_ERROR(call == "hide_memory" ? hide_memory() : drop_ptrace_right());
    return Json::object();
  }
  TRANSFUSE_RETURN_IF_ERROR(require(control_ != nullptr, "coordinator: connect first"));
  if (call == "coordinator") return coordinator();
  if (call == "versions" || call == "members" || call == "groups" || call == "history") {
    return control_call(call, request);
  }
  if (call == "stats") return stats();
  if (call == "allocate") return allocate(request);
  if (call == "fork") return fork_child();
  if (call == "publisher") return open_publisher(request);
  if (call == "receiver") return open_receiver(request);
  if (call == "hold") {
    transport_->hold(
        request.value("what", "weights") == "words" ? ReadKind::kWords : ReadKind::kWeights,
        request.value("read", uint64_t{1}));
    return Json::object();
  }
  if (call == "liar") {
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, make_layout(request));
    TRANSFUSE_ASSIGN_OR_RETURN(
        liar_, Liar::open(*transport_, *control_, layout, request.value("name", "trainer0"),
                          request.value("lie", "")));
    return Json::object();
  }
  if (call == "liar_table") {
    TRANSFUSE_RETURN_IF_ERROR(require(liar_ != nullptr, "liar"));
    TRANSFUSE_RETURN_IF_ERROR(liar_->answer_table(request.value("lie", "")));
    return Json::object();
  }
  if (call == "write") return write(request);
  if (call == "save") return save(request);
  if (call == "check") return check(request);
  if (call == "refit" || call == "stage" || call == "staged" || call == "commit" ||
      call == "rollback" || call == "check_group") {
    TRANSFUSE_RETURN_IF_ERROR(require(receiver_ != nullptr, "receiver"));
    return receiver_call(call, request);
  }
  if (call == "close_receiver") {
    TRANSFUSE_RETURN_IF_ERROR(require(receiver_ != nullptr, "receiver"));
    cancellable_ = nullptr;
    TRANSFUSE_RETURN_IF_ERROR(receiver_->close());
    receiver_.reset();
    return Json::object();
  }
  return publisher_call(call, request);
}

Result<Json> Member::connect(const Json& request) {
  options_.idle_exit_ms = request.value("idle_exit_ms", options_.idle_exit_ms);
  ControlOptions& control = options_.control;
  control.heartbeat_ms = request.value("heartbeat_ms", control.heartbeat_ms);
  control.member_ttl_ms = request.value("member_ttl_ms", control.member_ttl_ms);
  control.lease_ttl_ms = request.value("lease_ttl_ms", control.lease_ttl_ms);
  control.call_deadline_ms = request.value("call_deadline_ms", control.call_deadline_ms);
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string folder,
                             open_runtime_folder(options_.runtime_folder));
  TransportOptions transport;
  transport.threads = 2;
  TRANSFUSE_ASSIGN_OR_RETURN(auto shm, open_shm_transport(folder, transport));
  transport_ =
      std::make_unique<GatedTransport>(std::move(shm), [this] { tell_({{"event", "held"}}); });
  gate_ = transport_.get();
  TRANSFUSE_ASSIGN_OR_RETURN(control_, connect_control(options_));
  return Json::object();
}

Result<Json> Member::coordinator() {
  TRANSFUSE_ASSIGN_OR_RETURN(const CoordinatorInfo info, find_coordinator(options_));
  return Json{{"pid", info.pid}, {"epoch", info.epoch}, {"address", info.address}};
}

Result<Json> Member::open_publisher(const Json& request) {
  if (!request.value("same_memory", false)) {
    TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, make_layout(request));
    weights_.reset();
    TRANSFUSE_ASSIGN_OR_RETURN(
        weights_, Weights::open(*transport_, std::move(layout), request.value("memory", "heap")));
  }
  TRANSFUSE_RETURN_IF_ERROR(require(weights_ != nullptr, "memory"));
  PublisherOptions options;
  options.name = request.value("name", "trainer0");
  options.source_count = request.value("source_count", 1u);
  options.drain_ms = request.value("drain_ms", int64_t{5000});
  options.fingerprint_threads = 1;
  options.snapshot_slots = request.value("snapshot_slots", 0u);
  if (options.snapshot_slots > 0) options.retention = Retention::kSnapshot;
  options.snapshot_async = request.value("snapshot_async", false);
  options.snapshot_gigabytes_per_second = request.value("snapshot_gbs", 0.0);
  options.when_leased = static_cast<WhenLeased>(request.value("when_leased", 0));
  options.arenas = weights_->arenas();
  testing::Parameters& parameters = weights_->parameters();
  TRANSFUSE_ASSIGN_OR_RETURN(
      publisher_,
      Publisher::open(*transport_, *control_, parameters.layout(), parameters.memory(), options));
  return Json{{"digest", parameters.layout().digest().to_string()}};
}

Result<Json> Member::publisher_call(const std::string& call, const Json& request) {
  TRANSFUSE_RETURN_IF_ERROR(require(publisher_ != nullptr, "publisher"));
  const auto version = request.value("version", uint64_t{0});
  Json answer = Json::object();
  if (call == "begin_write" || call == "update") {
    TRANSFUSE_ASSIGN_OR_RETURN(const WriteTiming timing, publisher_->begin_write(version));
    answer["revoked"] = timing.revoked;
    answer["waited_us"] = timing.waited_us;
    if (call == "begin_write") return answer;
    TRANSFUSE_ASSIGN_OR_RETURN(const Json written, write(request));
  }
  if (call == "publish" || call == "update") {
    TRANSFUSE_ASSIGN_OR_RETURN(const PublishTiming timing, publisher_->publish(version));
    answer["skipped"] = timing.skipped;
    answer["copying"] = timing.copying;
    answer["publish_revoked"] = timing.revoked;
    return answer;
  }
  if (call == "snapshot" || call == "wait_published") {
    SnapshotProgress progress = publisher_->snapshot();
    if (call == "wait_published") {
      TRANSFUSE_ASSIGN_OR_RETURN(progress, publisher_->wait_published(deadline_of(request)));
    }
    answer["state"] = static_cast<int>(progress.state);
    answer["version"] = progress.version;
    answer["copied_bytes"] = progress.copied_bytes;
    return answer;
  }
  if (call == "abort") {
    TRANSFUSE_RETURN_IF_ERROR(publisher_->abort_write(request.value("reason", "a test")));
    return answer;
  }
  if (call == "close_publisher") {
    auto closed = publisher_->close();
    publisher_.reset();
    if (!closed) return Unexpected{std::move(closed).error()};
    return answer;
  }
  return Error{ErrorCode::kInvalidArgument, "no request is called '" + call + "'"};
}

// "values": the version whose values are written, if it is not "version".
Result<Json> Member::write(const Json& request) {
  TRANSFUSE_RETURN_IF_ERROR(require(weights_ != nullptr, "memory"));
  weights_->parameters().write(request.value("values", request.value("version", uint64_t{0})));
  return Json::object();
}

// "path": a folder that is there; "version": what the file records.
Result<Json> Member::save(const Json& request) {
  TRANSFUSE_RETURN_IF_ERROR(require(weights_ != nullptr, "memory"));
  const std::filesystem::path folder = request.value("path", "");
  std::ofstream(folder / "config.json") << testing::kSmallConfig;
  testing::write_rank(folder / "rank0.safetensors", weights_->parameters(),
                      request.value("version", uint64_t{0}));
  return Json::object();
}

Result<Json> Member::open_receiver(const Json& request) {
  TRANSFUSE_ASSIGN_OR_RETURN(Layout layout, make_layout(request));
  TRANSFUSE_ASSIGN_OR_RETURN(
      weights_, Weights::open(*transport_, std::move(layout), request.value("memory", "heap")));
  ReceiverOptions options;
  options.name = request.value("name", "engine0");
  options.verify = request.value("verify", true) ? Verify::kFull : Verify::kOff;
  options.no_progress_ms = request.value("no_progress_ms", int64_t{500});
  options.max_attempts = request.value("max_attempts", 50u);
  options.plan.chunk_bytes = request.value("chunk_bytes", uint64_t{4096});
  if (request.value("into", "in_place") == "shadow") options.into = ReceiveInto::kShadow;
  options.keep_previous = request.value("keep_previous", false);
  options.group = request.value("group", "");
  options.group_size = request.value("group_size", 0u);
  options.round_ms = request.value("round_ms", int64_t{20000});
  if (request.contains("checkpoint")) {
    options.checkpoint = Checkpoint{.path = request.value("checkpoint", ""),
                                    .spec = request.value("checkpoint_spec", "hf")};
    options.checkpoint_wait_ms = request.value("checkpoint_wait_ms", int64_t{200});
  }
  options.arenas = weights_->arenas();
  testing::Parameters& parameters = weights_->parameters();
  parameters.poison(std::byte{0xEE});
  TRANSFUSE_ASSIGN_OR_RETURN(receiver_, Receiver::open(*transport_, *control_, parameters.layout(),
                                                       parameters.memory(), options));
  cancellable_ = receiver_.get();
  return Json::object();
}

Result<Json> Member::refit(const Json& request) {
  return report_answer(receiver_->refit(version_request(request), deadline_of(request)));
}

Result<Json> Member::receiver_call(const std::string& call, const Json& request) {
  if (call == "refit") return refit(request);
  if (call == "commit") return report_answer(receiver_->commit(deadline_of(request)));
  if (call == "rollback") {
    TRANSFUSE_ASSIGN_OR_RETURN(const uint64_t version, receiver_->rollback(deadline_of(request)));
    return Json{{"version", version}};
  }
  if (call == "check_group") {
    TRANSFUSE_ASSIGN_OR_RETURN(const GroupInfo group, receiver_->check_group());
    return Json{{"version", group.version}};
  }
  if (call == "stage") {
    TRANSFUSE_RETURN_IF_ERROR(
        receiver_->stage(version_request(request), deadline_of(request),
                         {.max_gigabytes_per_second = request.value("max_gbs", 0.0)}));
    if (!request.value("wait", true)) return Json::object();
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const StageProgress staged,
                             receiver_->wait_staged(deadline_of(request)));
  return Json{{"version", staged.version}};
}

Result<Json> Member::check(const Json& request) {
  TRANSFUSE_RETURN_IF_ERROR(require(weights_ != nullptr, "memory"));
  const auto values = request.value("values", uint64_t{0});
  return Json{{"wrong", weights_->parameters().wrong_elements(values)}};
}

Result<Json> Member::control_call(const std::string& call, const Json& request) {
  Json list = Json::array();
  if (call == "history") {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto events,
                               control_->history("model", request.value("version", uint64_t{0})));
    for (const VersionEvent& event : events) list.push_back(event.who + " " + event.what);
    return Json{{call, list}};
  }
  if (call == "groups") {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto groups, control_->groups(""));
    for (const GroupInfo& group : groups) {
      list.push_back({{"name", group.name},
                      {"state", group_state_name(group.state)},
                      {"version", group.version},
                      {"reason", group.reason}});
    }
    return Json{{call, list}};
  }
  if (call == "versions") {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto versions, control_->versions(""));
    for (const VersionInfo& version : versions) {
      list.push_back({{"version", version.version},
                      {"state", version_state_name(version.state)},
                      {"leases", version.leases},
                      {"reason", version.reason}});
    }
  } else {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto members, control_->members(""));
    for (const MemberInfo& member : members) {
      list.push_back({{"name", member.name}, {"version", member.version}});
    }
  }
  return Json{{call, list}};
}

Result<Json> Member::stats() {
  const TransportStats stats = transport_->stats();
  Json answer = process_facts();
  answer["regions"] = stats.regions;
  answer["region_bytes"] = stats.region_bytes;
  answer["peers"] = stats.peers;
  answer["remote_regions"] = stats.remote_regions;
  answer["tickets"] = stats.tickets;
  answer["poisoned_bytes"] = stats.poisoned_bytes;
  answer["wall_s"] = std::chrono::duration_cast<std::chrono::seconds>(
                         std::chrono::system_clock::now().time_since_epoch())
                         .count();
  return answer;
}

Result<Json> Member::allocate(const Json& request) {
  TRANSFUSE_ASSIGN_OR_RETURN(spare_,
                             transport_->allocate(request.value("size_bytes", uint64_t{0})));
  return Json{{"size_bytes", spare_->bytes().size()}};
}

// Every handle is used, then destroyed.
Json Member::use_in_child() {
  Json codes = Json::object();
  codes["transport.allocate"] = code_of(transport_->allocate(4096));
  codes["control.versions"] = code_of(control_->versions(""));
  if (publisher_) {
    codes["publisher.begin_write"] = code_of(publisher_->begin_write(1000000));
    codes["publisher.wait_published"] =
        code_of(publisher_->wait_published(Deadline::after_ms(1000)));
    codes["publisher.publish"] = code_of(publisher_->publish(1000000));
  }
  if (receiver_) {
    codes["receiver.refit"] = code_of(receiver_->refit({}, Deadline::after_ms(1000)));
  }
  receiver_.reset();
  publisher_.reset();
  weights_.reset();
  spare_.reset();
  control_.reset();
  transport_.reset();
  return codes;
}

Result<Json> Member::fork_child() {
  std::array<int, 2> ends{};
  if (::pipe(ends.data()) != 0) return Error{ErrorCode::kResourceExhausted, "no pipe"};
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(kChildSeconds);  // a lock of the parent that is waited for ends here
    const std::string said = use_in_child().dump();
    const bool all =
        ::write(ends[1], said.data(), said.size()) == static_cast<ssize_t>(said.size());
    ::_exit(all ? 0 : 1);
  }
  ::close(ends[1]);
  std::string said;
  std::array<char, 4096> bytes{};
  ssize_t got = 0;
  while ((got = ::read(ends[0], bytes.data(), bytes.size())) > 0) {
    said.append(bytes.data(), static_cast<size_t>(got));
  }
  ::close(ends[0]);
  int status = -1;
  if (child > 0) ::waitpid(child, &status, 0);
  return Json{{"status", status}, {"codes", Json::parse(said, nullptr, false)}};
}

}  // namespace transfuse::faults
