// Publisher, Receiver and Control for Python: each with its job's transport and coordinator inside.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "memory.h"
#include "operation.h"
#include "session.h"
#include "transfuse/checkpoint.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

constexpr int64_t kWatchSliceMs = 100;  // how late Ctrl-C is seen
constexpr int64_t kWaitSliceMs = 200;   // likewise, in a wait for what goes on behind it

using Parameters = nb::typed<nb::dict, nb::str, nb::object>;

// What a publisher or receiver stands on, in the order in which it is built up.
struct Ground {
  std::shared_ptr<Session> session;
  std::vector<std::shared_ptr<ArenaMemory>> arenas;
  ParameterOwners owners;

  Ground(SessionOptions options, const Layout& layout, const Parameters& parameters,
         bool writable) {
    for (const auto& [name, object] : parameters)
      owners.add(layout, nb::cast<std::string>(name), object, writable);
    if (options.device) owners.expect_device(*options.device);
    if (!options.device) options.device = owners.device();
    const nb::gil_scoped_release unlocked;
    session = take(Session::open(options));
    arenas = session->arenas();
    std::erase_if(arenas, [this](const auto& arena) { return !is_used(*arena); });
  }
  std::vector<const LocalRegion*> regions() const {
    std::vector<const LocalRegion*> regions;
    for (const auto& arena : arenas) regions.push_back(arena->region.get());
    return regions;
  }

 private:
  bool is_used(const ArenaMemory& arena) const {
    const std::span<std::byte> bytes = arena.region->bytes();
    return std::ranges::any_of(owners.memory(), [&](const ParameterMemory& p) {
      return p.data >= bytes.data() && p.data < bytes.data() + bytes.size();
    });
  }
};

// A Publisher or Receiver on its ground. Member order is the order of destruction, reversed: the
// thread ends before what it works on, the memory stays to the end.
template <typename Native>
class Member {
 public:
  template <typename Options>
  Member(const SessionOptions& session_options, const Layout& layout, const Parameters& parameters,
         bool writable, Options options)
      : name_(options.name), ground_(Ground(session_options, layout, parameters, writable)) {
    device_ = ground_->session->device();
    options.arenas = ground_->regions();
    native_ = take(thread_->run(
        [session = ground_->session, layout, options, memory = ground_->owners.memory()] {
          return open(*session, layout, memory, options);
        }));
  }
  ~Member() { release(); }
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  Native& native() {
    if (native_ == nullptr) throw Failure({ErrorCode::kUnavailable, "'" + name_ + "' is closed"});
    return *native_;
  }
  std::optional<int> device() const { return device_; }
  OperationThread& thread() { return *thread_; }
  void close() {
    if (native_ == nullptr) return;
    Native& open_native = *native_;
    auto closed = thread_->run([&open_native] { return open_native.close(); });
    release();
    take(std::move(closed));
  }

 private:
  template <typename Options>
  static Result<std::unique_ptr<Native>> open(Session& session, const Layout& layout,
                                              const std::vector<ParameterMemory>& memory,
                                              const Options& options) {
    TRANSFUSE_ASSIGN_OR_RETURN(Control * control, session.control());
    return Native::open(session.transport(), *control, layout, memory, options);
  }
  void release() {
    // Taken away while no other thread of Python can be inside: some things may be asked from any.
    std::unique_ptr<Native> ended = std::move(native_);
    {
      const nb::gil_scoped_release unlocked;
      thread_.reset();
      ended.reset();
    }
    ground_.reset();
  }

  std::string name_;
  std::optional<int> device_;
  std::optional<Ground> ground_;
  std::unique_ptr<Native> native_;
  std::unique_ptr<OperationThread> thread_ = std::make_unique<OperationThread>();
};

SessionOptions session_options(std::string job, std::optional<std::string> address,
                               std::optional<std::string> token, std::optional<uint32_t> threads,
                               std::optional<bool> allow_any_tracer, std::optional<int> device) {
  return {.job = std::move(job),
          .address = std::move(address),
          .token = std::move(token),
          .threads = threads,
          .allow_any_tracer = allow_any_tracer,
          .device = device};
}

// What `wait(deadline)` returns, asked in slices: Ctrl-C ends the wait, and what it waits for goes
// on. `goes_on()`: whether that has not ended.
template <typename Wait, typename GoesOn>
auto wait_in_slices(OperationThread& thread, int64_t timeout_ms, Wait wait, GoesOn goes_on) {
  const Deadline deadline = Deadline::after_ms(timeout_ms);
  while (true) {
    const Deadline slice = deadline.earlier(Deadline::after_ms(kWaitSliceMs));
    const auto wait_a_slice = [wait, slice] { return wait(slice); };
    auto progress = thread.run(wait_a_slice);
    const bool late = !progress && progress.error().code == ErrorCode::kDeadlineExceeded;
    if (!late || deadline.passed()) return take(std::move(progress));
    // It may have ended after the wait did: how, another wait says at once.
    if (!goes_on()) return take(thread.run(wait_a_slice));
  }
}

class PythonPublisher : public Member<Publisher> {
 public:
  using Member::Member;
  WriteTiming begin_write(uint64_t version) {
    Publisher& publisher = native();
    return take(thread().run([&publisher, version] { return publisher.begin_write(version); }));
  }
  PublishTiming publish(uint64_t version, Metadata metadata,
                        const std::optional<Digest>& revision) {
    Publisher& publisher = native();
    const VersionWords words{.metadata = std::move(metadata),
                             .revision = revision.value_or(Digest{})};
    return take(
        thread().run([&publisher, version, words] { return publisher.publish(version, words); }));
  }
  SnapshotProgress wait_published(int64_t timeout_ms) {
    Publisher& publisher = native();
    return wait_in_slices(
        thread(), timeout_ms,
        [&publisher](Deadline slice) { return publisher.wait_published(slice); },
        [&publisher] { return publisher.snapshot().state == SnapshotState::kCopying; });
  }
  void set_retention(Retention retention) {
    Publisher& publisher = native();
    take(thread().run([&publisher, retention] { return publisher.set_retention(retention); }));
  }
  void abort_write(const std::string& reason) {
    Publisher& publisher = native();
    take(thread().run([&publisher, reason] { return publisher.abort_write(reason); }));
  }
};

class PythonReceiver : public Member<Receiver> {
 public:
  using Member::Member;
  RefitReport refit(std::optional<uint64_t> exactly, std::optional<uint64_t> at_least,
                    const Demand& demand, int64_t timeout_ms) {
    const VersionRequest request = version_request(exactly, at_least, demand);
    Receiver& receiver = native();
    const auto call = [&receiver, request, timeout_ms] {
      return receiver.refit(request, Deadline::after_ms(timeout_ms));
    };
    return take(thread().run(call, [&receiver] { receiver.cancel(); }));
  }
  void stage(std::optional<uint64_t> exactly, std::optional<uint64_t> at_least,
             const Demand& demand, int64_t timeout_ms, double max_gigabytes_per_second,
             uint32_t max_multiprocessors) {
    const VersionRequest request = version_request(exactly, at_least, demand);
    const StageOptions options{.max_gigabytes_per_second = max_gigabytes_per_second,
                               .max_multiprocessors = max_multiprocessors};
    Receiver& receiver = native();
    take(thread().run([&receiver, request, timeout_ms, options] {
      return receiver.stage(request, Deadline::after_ms(timeout_ms), options);
    }));
  }
  StageProgress wait_staged(int64_t timeout_ms) {
    Receiver& receiver = native();
    return wait_in_slices(
        thread(), timeout_ms, [&receiver](Deadline slice) { return receiver.wait_staged(slice); },
        [&receiver] { return receiver.staged().state == StageState::kMoving; });
  }
  RefitReport commit(int64_t timeout_ms) {
    Receiver& receiver = native();
    const auto call = [&receiver, timeout_ms] {
      return receiver.commit(Deadline::after_ms(timeout_ms));
    };
    return take(thread().run(call, [&receiver] { receiver.cancel(); }));
  }
  uint64_t rollback(int64_t timeout_ms) {
    Receiver& receiver = native();
    return take(thread().run(
        [&receiver, timeout_ms] { return receiver.rollback(Deadline::after_ms(timeout_ms)); }));
  }
  GroupInfo check_group() {
    Receiver& receiver = native();
    return take(thread().run([&receiver] { return receiver.check_group(); }));
  }

 private:
  static VersionRequest version_request(std::optional<uint64_t> exactly,
                                        std::optional<uint64_t> at_least, const Demand& demand) {
    if (exactly && at_least) {
      throw Failure({ErrorCode::kInvalidArgument, "give `exactly` or `at_least`, not both"});
    }
    VersionRequest request;
    if (exactly) request = {.kind = VersionRequest::Kind::kExactly, .version = *exactly};
    if (at_least) request = {.kind = VersionRequest::Kind::kAtLeast, .version = *at_least};
    request.demand = demand;
    return request;
  }
};

void bind_publisher(nb::module_& m) {
  nb::enum_<Retention>(m, "Retention", "What readers of a version read while the trainer goes on.")
      .value("IN_PLACE", Retention::kInPlace)
      .value("SNAPSHOT", Retention::kSnapshot);
  nb::enum_<WhenLeased>(m, "WhenLeased", "What publish() does if readers hold every snapshot.")
      .value("REVOKE_AT_DEADLINE", WhenLeased::kRevokeAtDeadline)
      .value("WAIT", WhenLeased::kWait)
      .value("REVOKE", WhenLeased::kRevoke)
      .value("SKIP", WhenLeased::kSkip);
  nb::enum_<SnapshotPlace>(m, "SnapshotPlace")
      .value("WITH_WEIGHTS", SnapshotPlace::kWithWeights)
      .value("HOST", SnapshotPlace::kHost);
  m.def("snapshot_bytes", &snapshot_bytes, "layout"_a, "slots"_a,
        "Memory that so many snapshots of a layout need, beside the weights.");
  nb::class_<PythonPublisher>(m, "NativePublisher", "See transfuse.Publisher.")
      .def(
          "__init__",
          [](PythonPublisher* self, const Layout& layout, const Parameters& parameters,
             std::string name, std::string model, uint32_t source_count, int64_t drain_ms,
             Retention retention, uint32_t snapshot_slots, SnapshotPlace snapshot_place,
             double snapshot_gigabytes_per_second, bool snapshot_async, WhenLeased when_leased,
             uint32_t fingerprint_threads, Metadata metadata, bool compute_revision,
             std::string job, std::optional<std::string> address, std::optional<std::string> token,
             std::optional<uint32_t> threads, std::optional<bool> allow_any_tracer,
             std::optional<int> device) {
            PublisherOptions options;
            options.metadata = std::move(metadata);
            options.compute_revision = compute_revision;
            options.model = std::move(model);
            options.name = std::move(name);
            options.source_count = source_count;
            options.drain_ms = drain_ms;
            options.retention = retention;
            options.snapshot_slots = snapshot_slots;
            options.snapshot_place = snapshot_place;
            options.snapshot_gigabytes_per_second = snapshot_gigabytes_per_second;
            options.snapshot_async = snapshot_async;
            options.when_leased = when_leased;
            options.fingerprint_threads = fingerprint_threads;
            new (self) PythonPublisher(
                session_options(std::move(job), std::move(address), std::move(token), threads,
                                allow_any_tracer, device),
                layout, parameters, false, std::move(options));
          },
          "layout"_a, "parameters"_a, nb::kw_only(), "name"_a, "model"_a, "source_count"_a,
          "drain_ms"_a, "retention"_a, "snapshot_slots"_a, "snapshot_place"_a,
          "snapshot_gigabytes_per_second"_a, "snapshot_async"_a, "when_leased"_a,
          "fingerprint_threads"_a, "metadata"_a, "compute_revision"_a, "job"_a, "address"_a.none(),
          "token"_a.none(), "threads"_a.none(), "allow_any_tracer"_a.none(), "device"_a.none())
      .def("begin_write", &PythonPublisher::begin_write, "version"_a)
      .def("publish", &PythonPublisher::publish, "version"_a, "metadata"_a, "revision"_a.none())
      .def("abort_write", &PythonPublisher::abort_write, "reason"_a)
      .def("set_retention", &PythonPublisher::set_retention, "retention"_a)
      .def("wait_published", &PythonPublisher::wait_published, "timeout_ms"_a)
      .def_prop_ro("snapshot", [](PythonPublisher& p) { return p.native().snapshot(); })
      .def_prop_ro("version", [](PythonPublisher& p) { return p.native().version(); })
      .def_prop_ro("device", &PythonPublisher::device)
      .def("close", &PythonPublisher::close);
}

void bind_receiver(nb::module_& m) {
  nb::enum_<Verify>(m, "Verify", "Whether a refit compares fingerprints.")
      .value("FULL", Verify::kFull)
      .value("OFF", Verify::kOff);
  nb::enum_<ReceiveInto>(m, "ReceiveInto", "Where versions arrive.")
      .value("IN_PLACE", ReceiveInto::kInPlace)
      .value("SHADOW", ReceiveInto::kShadow);
  m.def("shadow_bytes", &shadow_bytes, "layout"_a,
        "Memory that a shadow of a layout needs, beside the parameters.");
  nb::class_<PythonReceiver>(m, "NativeReceiver", "See transfuse.Receiver.")
      .def(
          "__init__",
          [](PythonReceiver* self, const Layout& layout, const Parameters& parameters,
             std::string name, std::string model, Verify verify, uint64_t chunk_bytes,
             uint64_t spread, int64_t no_progress_ms, uint32_t max_attempts, ReceiveInto into,
             bool keep_previous, std::string group, uint32_t group_size, int64_t round_ms,
             std::optional<Checkpoint> checkpoint, int64_t checkpoint_wait_ms, const Demand& demand,
             std::string job, std::optional<std::string> address, std::optional<std::string> token,
             std::optional<uint32_t> threads, std::optional<bool> allow_any_tracer,
             std::optional<int> device) {
            ReceiverOptions options;
            options.model = std::move(model);
            options.name = std::move(name);
            options.verify = verify;
            options.plan.chunk_bytes = chunk_bytes;
            options.spread = spread;
            options.no_progress_ms = no_progress_ms;
            options.max_attempts = max_attempts;
            options.into = into;
            options.keep_previous = keep_previous;
            options.group = std::move(group);
            options.group_size = group_size;
            options.round_ms = round_ms;
            options.demand = demand;
            options.checkpoint = std::move(checkpoint);
            options.checkpoint_wait_ms = checkpoint_wait_ms;
            new (self)
                PythonReceiver(session_options(std::move(job), std::move(address), std::move(token),
                                               threads, allow_any_tracer, device),
                               layout, parameters, true, std::move(options));
          },
          "layout"_a, "parameters"_a, nb::kw_only(), "name"_a, "model"_a, "verify"_a,
          "chunk_bytes"_a, "spread"_a, "no_progress_ms"_a, "max_attempts"_a, "into"_a,
          "keep_previous"_a, "group"_a, "group_size"_a, "round_ms"_a, "checkpoint"_a.none(),
          "checkpoint_wait_ms"_a, "demand"_a, "job"_a, "address"_a.none(), "token"_a.none(),
          "threads"_a.none(), "allow_any_tracer"_a.none(), "device"_a.none())
      .def("refit", &PythonReceiver::refit, nb::kw_only(), "exactly"_a.none(), "at_least"_a.none(),
           "demand"_a, "timeout_ms"_a)
      .def("stage", &PythonReceiver::stage, nb::kw_only(), "exactly"_a.none(), "at_least"_a.none(),
           "demand"_a, "timeout_ms"_a, "max_gigabytes_per_second"_a, "max_multiprocessors"_a)
      .def_prop_ro("staged", [](PythonReceiver& r) { return r.native().staged(); })
      .def("wait_staged", &PythonReceiver::wait_staged, "timeout_ms"_a)
      .def("commit", &PythonReceiver::commit, "timeout_ms"_a)
      .def("rollback", &PythonReceiver::rollback, "timeout_ms"_a)
      .def("check_group", &PythonReceiver::check_group)
      .def_prop_ro("last_report", [](PythonReceiver& r) { return r.native().last_report(); })
      .def_prop_ro("version", [](PythonReceiver& r) { return r.native().version(); })
      .def_prop_ro("device", &PythonReceiver::device)
      .def("cancel", [](PythonReceiver& r) { r.native().cancel(); })
      .def("close", &PythonReceiver::close);
}

// A stream of version changes, with the session that it belongs to.
class PythonWatch {
 public:
  PythonWatch(std::shared_ptr<Session> session, std::unique_ptr<Watch> watch)
      : session_(std::move(session)), watch_(std::move(watch)) {}
  std::optional<VersionInfo> next(int64_t timeout_ms) {
    const Deadline deadline = Deadline::after_ms(timeout_ms);
    while (true) {
      std::optional<VersionInfo> change;
      {
        const nb::gil_scoped_release unlocked;
        change = take(watch_->next(deadline.earlier(Deadline::after_ms(kWatchSliceMs))));
      }
      if (PyErr_CheckSignals() != 0) throw nb::python_error();
      if (change || deadline.passed()) return change;
    }
  }

 private:
  std::shared_ptr<Session> session_;  // shared with everything of the job; first: outlives watch_
  std::unique_ptr<Watch> watch_;
};

// The control plane of a job, without being a member of it.
class PythonControl {
 public:
  PythonControl(std::string job, std::optional<std::string> address,
                std::optional<std::string> token) {
    const nb::gil_scoped_release unlocked;
    session_ = take(Session::open(
        session_options(std::move(job), std::move(address), std::move(token), {}, {}, {})));
    control_ = take(session_->control());
  }
  std::vector<VersionInfo> versions(const std::string& model) {
    const nb::gil_scoped_release unlocked;
    return take(control_->versions(model));
  }
  std::vector<MemberInfo> members(const std::string& model) {
    const nb::gil_scoped_release unlocked;
    return take(control_->members(model));
  }
  std::vector<GroupInfo> groups(const std::string& model) {
    const nb::gil_scoped_release unlocked;
    return take(control_->groups(model));
  }
  std::vector<VersionEvent> history(const std::string& model, uint64_t version) {
    const nb::gil_scoped_release unlocked;
    return take(control_->history(model, version));
  }
  std::unique_ptr<PythonWatch> watch(const std::string& model) {
    const nb::gil_scoped_release unlocked;
    return std::make_unique<PythonWatch>(session_, take(control_->watch(model)));
  }
  VersionRevision revision(const std::string& model, uint64_t version, int64_t timeout_ms) {
    OperationThread thread;
    return take(thread.run([session = session_, control = control_, model, version, timeout_ms] {
      return version_revision(session->transport(), *control, model, version,
                              Deadline::after_ms(timeout_ms));
    }));
  }
  VerifyReport verify(const std::string& model, int64_t timeout_ms) {
    OperationThread thread;
    return take(thread.run([session = session_, control = control_, model, timeout_ms] {
      return verify_model(session->transport(), *control, model, Deadline::after_ms(timeout_ms));
    }));
  }

 private:
  std::shared_ptr<Session> session_;  // shared with everything of the job in this process
  Control* control_ = nullptr;
};

void bind_control(nb::module_& m) {
  nb::class_<PythonWatch>(m, "NativeWatch", "Changes of versions; see Control.watch().")
      .def("next", &PythonWatch::next, "timeout_ms"_a,
           "The next change, or None when the time is over.");
  nb::class_<PythonControl>(m, "NativeControl", "See transfuse.Control.")
      .def(nb::init<std::string, std::optional<std::string>, std::optional<std::string>>(),
           nb::kw_only(), "job"_a, "address"_a.none(), "token"_a.none())
      .def("versions", &PythonControl::versions, "model"_a)
      .def("members", &PythonControl::members, "model"_a)
      .def("groups", &PythonControl::groups, "model"_a)
      .def("history", &PythonControl::history, "model"_a, "version"_a)
      .def("watch", &PythonControl::watch, "model"_a)
      .def("revision", &PythonControl::revision, "model"_a, "version"_a, "timeout_ms"_a)
      .def("verify", &PythonControl::verify, "model"_a, "timeout_ms"_a);
}

}  // namespace

void bind_session(nb::module_& m) {
  bind_publisher(m);
  bind_receiver(m);
  bind_control(m);
}

}  // namespace transfuse::python
