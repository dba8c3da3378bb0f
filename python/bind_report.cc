// What a refit, a write and a verification report.
#include <nanobind/nanobind.h>
#include <nanobind/operators.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>

#include "bind.h"
#include "transfuse/control.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/verify.h"

namespace transfuse::python {
namespace {

using namespace nanobind::literals;

void bind_refit(nb::module_& m) {
  nb::class_<RefitPhases>(m, "RefitPhases", "Where the time of a refit went, in microseconds.")
      .def_ro("discover_us", &RefitPhases::discover_us)
      .def_ro("lease_us", &RefitPhases::lease_us)
      .def_ro("transfer_us", &RefitPhases::transfer_us)
      .def_ro("verify_us", &RefitPhases::verify_us)
      .def_ro("decide_us", &RefitPhases::decide_us)
      .def_ro("commit_us", &RefitPhases::commit_us)
      .def_ro("total_us", &RefitPhases::total_us);
  nb::class_<RefitRoute>(m, "RefitRoute", "What came from one source, and how.")
      .def_ro("source", &RefitRoute::source)
      .def_ro("transport", &RefitRoute::transport)
      .def_ro("route", &RefitRoute::route)
      .def_ro("size_bytes", &RefitRoute::size_bytes)
      .def_ro("run_count", &RefitRoute::run_count);
  nb::class_<RefitStep>(m, "RefitStep", "A failure on the way, and what was done about it.")
      .def_ro("code", &RefitStep::code)
      .def_ro("source", &RefitStep::source)
      .def_ro("what", &RefitStep::what)
      .def("__repr__", [](const RefitStep& s) {
        return "RefitStep(" + std::string(error_code_name(s.code)) + ", " + s.source + ", " +
               s.what + ")";
      });
  nb::class_<RefitReport>(m, "RefitReport", "What one refit did.")
      .def_ro("version", &RefitReport::version)
      .def_ro("phases", &RefitReport::phases)
      .def_ro("size_bytes", &RefitReport::size_bytes)
      .def_ro("source_bytes", &RefitReport::source_bytes)
      .def_ro("reread_bytes", &RefitReport::reread_bytes)
      .def_ro("chunk_count", &RefitReport::chunk_count)
      .def_ro("verified_bytes", &RefitReport::verified_bytes)
      .def_ro("attempts", &RefitReport::attempts)
      .def_ro("planned", &RefitReport::planned)
      .def_ro("checkpoint", &RefitReport::checkpoint)
      .def_ro("gigabytes_per_second", &RefitReport::gigabytes_per_second)
      .def_ro("routes", &RefitReport::routes)
      .def_ro("steps", &RefitReport::steps)
      .def_prop_ro("revision", [](const RefitReport& r) { return stated(r.revision); })
      .def_ro("metadata", &RefitReport::metadata)
      .def("to_json", &RefitReport::to_json)
      .def("to_text", &RefitReport::to_text)
      .def("__repr__", &RefitReport::to_text);
  nb::class_<WriteTiming>(m, "WriteTiming", "What begin_write() waited for.")
      .def_ro("waited_us", &WriteTiming::waited_us)
      .def_ro("revoked", &WriteTiming::revoked)
      .def_ro("copy_waited_us", &WriteTiming::copy_waited_us);
  nb::class_<PublishTiming>(m, "PublishTiming", "What publish() waited for and copied.")
      .def_ro("waited_us", &PublishTiming::waited_us)
      .def_ro("revoked", &PublishTiming::revoked)
      .def_ro("copy_us", &PublishTiming::copy_us)
      .def_ro("skipped", &PublishTiming::skipped)
      .def_ro("copying", &PublishTiming::copying);
  nb::enum_<SnapshotState>(m, "SnapshotState")
      .value("NONE", SnapshotState::kNone)
      .value("COPYING", SnapshotState::kCopying)
      .value("PUBLISHED", SnapshotState::kPublished)
      .value("SKIPPED", SnapshotState::kSkipped)
      .value("FAILED", SnapshotState::kFailed);
  nb::class_<SnapshotProgress>(m, "SnapshotProgress", "See transfuse.Publisher.snapshot.")
      .def_ro("state", &SnapshotProgress::state)
      .def_ro("version", &SnapshotProgress::version)
      .def_ro("copied_bytes", &SnapshotProgress::copied_bytes)
      .def_ro("size_bytes", &SnapshotProgress::size_bytes)
      .def_ro("elapsed_us", &SnapshotProgress::elapsed_us);
}

void bind_versions(nb::module_& m) {
  nb::enum_<VersionState>(m, "VersionState", "Where a version is in its life.")
      .value("OPEN", VersionState::kOpen)
      .value("READY", VersionState::kReady)
      .value("RETIRED", VersionState::kRetired)
      .value("ABORTED", VersionState::kAborted);
  nb::class_<VersionInfo>(m, "VersionInfo", "A version of a model as the coordinator knows it.")
      .def_ro("model", &VersionInfo::model)
      .def_ro("version", &VersionInfo::version)
      .def_ro("state", &VersionInfo::state)
      .def_ro("published", &VersionInfo::published)
      .def_ro("source_count", &VersionInfo::source_count)
      .def_ro("leases", &VersionInfo::leases)
      .def_ro("reason", &VersionInfo::reason)
      .def_prop_ro("revision", [](const VersionInfo& v) { return stated(v.revision); })
      .def_ro("metadata", &VersionInfo::metadata)
      .def("__repr__", [](const VersionInfo& v) {
        return "VersionInfo(" + v.model + " " + std::to_string(v.version) + " " +
               std::string(version_state_name(v.state)) + ", published by " +
               std::to_string(v.published) + " of " + std::to_string(v.source_count) + ")";
      });
  nb::enum_<MemberRole>(m, "MemberRole", "What a member of a job does.")
      .value("SOURCE", MemberRole::kSource)
      .value("TARGET", MemberRole::kTarget);
  nb::class_<MemberInfo>(m, "MemberInfo", "A process that publishes or receives a model.")
      .def_ro("role", &MemberInfo::role)
      .def_ro("model", &MemberInfo::model)
      .def_ro("name", &MemberInfo::name)
      .def_ro("layout", &MemberInfo::layout)
      .def_ro("version", &MemberInfo::version)
      .def_ro("kind", &MemberInfo::kind)
      .def_ro("metadata", &MemberInfo::metadata)
      .def_ro("version_metadata", &MemberInfo::version_metadata)
      .def_prop_ro("revision", [](const MemberInfo& i) { return stated(i.revision); });
}

void bind_groups(nb::module_& m) {
  nb::enum_<StageState>(m, "StageState", "Where a version is on its way into a shadow.")
      .value("NONE", StageState::kNone)
      .value("MOVING", StageState::kMoving)
      .value("READY", StageState::kReady)
      .value("FAILED", StageState::kFailed);
  nb::class_<StageProgress>(m, "StageProgress", "How far a stage is.")
      .def_ro("state", &StageProgress::state)
      .def_ro("version", &StageProgress::version)
      .def_ro("landed_bytes", &StageProgress::landed_bytes)
      .def_ro("size_bytes", &StageProgress::size_bytes);
  nb::enum_<GroupState>(m, "GroupState", "Whether the ranks of one engine may serve.")
      .value("FORMING", GroupState::kForming)
      .value("WHOLE", GroupState::kWhole)
      .value("SWITCHING", GroupState::kSwitching)
      .value("BROKEN", GroupState::kBroken);
  nb::class_<VersionEvent>(m, "VersionEvent", "One entry in the story of a version.")
      .def_ro("at_us", &VersionEvent::at_us, "Since the version was opened.")
      .def_ro("who", &VersionEvent::who, "A member, a group, or nobody.")
      .def_ro("what", &VersionEvent::what)
      .def("__repr__", [](const VersionEvent& e) {
        return "VersionEvent(" + std::to_string(e.at_us) + " us: " + e.who + " " + e.what + ")";
      });
  nb::class_<GroupRank>(m, "GroupRank", "A rank of a group, and the version that it holds.")
      .def_ro("name", &GroupRank::name)
      .def_ro("version", &GroupRank::version);
  nb::class_<GroupInfo>(m, "GroupInfo", "The ranks of one engine as the coordinator knows them.")
      .def_ro("model", &GroupInfo::model)
      .def_ro("name", &GroupInfo::name)
      .def_ro("size", &GroupInfo::size)
      .def_ro("state", &GroupInfo::state)
      .def_ro("version", &GroupInfo::version)
      .def_ro("round", &GroupInfo::round)
      .def_ro("reason", &GroupInfo::reason)
      .def_ro("ranks", &GroupInfo::ranks)
      .def("__repr__", [](const GroupInfo& g) {
        return "GroupInfo(" + g.model + "/" + g.name + ", " + std::to_string(g.ranks.size()) +
               " of " + std::to_string(g.size) + " ranks, " +
               std::string(group_state_name(g.state)) + ", version " + std::to_string(g.version) +
               ")";
      });
}

void bind_verdicts(nb::module_& m) {
  nb::class_<BoxMismatch>(m, "BoxMismatch", "A box whose fingerprints differ.")
      .def_ro("tensor", &BoxMismatch::tensor)
      .def_ro("box", &BoxMismatch::box)
      .def_ro("source_fingerprint", &BoxMismatch::source_fingerprint)
      .def_ro("target_fingerprint", &BoxMismatch::target_fingerprint);
  nb::class_<TargetVerdict>(m, "TargetVerdict", "One target against its sources.")
      .def_ro("target", &TargetVerdict::target)
      .def_ro("version", &TargetVerdict::version)
      .def_ro("box_count", &TargetVerdict::box_count)
      .def_ro("size_bytes", &TargetVerdict::size_bytes)
      .def_ro("mismatches", &TargetVerdict::mismatches)
      .def_ro("not_compared", &TargetVerdict::not_compared)
      .def_prop_ro("matches", &TargetVerdict::matches);
  nb::class_<VersionRevision>(m, "VersionRevision", "The content address of a version.")
      .def_ro("version", &VersionRevision::version)
      .def_ro("computed", &VersionRevision::computed)
      .def_prop_ro("stated", [](const VersionRevision& r) { return stated(r.stated); });
  nb::class_<VerifyReport>(m, "VerifyReport", "Every target of a model against its sources.")
      .def_ro("model", &VerifyReport::model)
      .def_ro("targets", &VerifyReport::targets)
      .def_prop_ro("matches", &VerifyReport::matches)
      .def("to_json", &VerifyReport::to_json)
      .def("to_text", &VerifyReport::to_text)
      .def("__repr__", &VerifyReport::to_text);
}

}  // namespace

void bind_report(nb::module_& m) {
  bind_refit(m);
  bind_versions(m);
  bind_groups(m);
  bind_verdicts(m);
}

}  // namespace transfuse::python
