// Demands over gRPC: what a source says reaches who asks, also through a coordinator that died.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "rpc/member_process.h"
#include "rpc/rpc.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

constexpr Digest kRevision{.high = 1, .low = 2};

class DemandOverRpc : public CoordinatorTest {
 protected:
  static Result<MemberId> join_with(Control& control, const std::string& name,
                                    const std::string& kind, const Metadata& metadata) {
    TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, small_layout().with_kind(kind));
    TRANSFUSE_RETURN_IF_ERROR(control.put_layout(layout));
    return control.join({.role = MemberRole::kSource,
                         .model = "policy",
                         .name = name,
                         .source_count = 2,
                         .incarnation = static_cast<uint64_t>(getpid()),
                         .layout = layout.digest(),
                         .descriptor = "at " + name,
                         .kind = kind,
                         .metadata = metadata});
  }
  static Result<void> write(Control& control, MemberId source, uint64_t version) {
    TRANSFUSE_RETURN_IF_ERROR(
        control.begin_write(source, in_place(version), Deadline::after_ms(20000)));
    Offer offered = offer(version);
    offered.metadata = {{"step", std::to_string(version * 10)}};
    offered.revision = kRevision;
    return control.publish(source, offered);
  }
};

TEST_F(DemandOverRpc, OnlyTheReplicaThatFitsIsLeasedAlsoByTheNextCoordinator) {
  auto trainer = connect();
  auto engine = connect();
  const MemberId raw = join_with(*trainer, "raw", "hf_raw", {{"run", "x"}}).value();
  const MemberId packed = join_with(*trainer, "packed", "cutlass_fp8", {}).value();
  ASSERT_TRUE(write(*trainer, raw, 4));
  ASSERT_TRUE(write(*trainer, packed, 4));
  const MemberId target = join_as(*engine, MemberRole::kTarget, "engine0").value();
  const VersionRequest wanted{
      .demand = {.kinds = {"hf_raw"},
                 .require = {{.key = "run", .value = "x"},
                             {.key = "step", .kind = Requirement::Kind::kAtLeast, .value = "40"}},
                 .revision = kRevision}};
  for (const bool restarted : {false, true}) {
    if (restarted) {
      ASSERT_EQ(::kill(static_cast<pid_t>(coordinator().pid), SIGKILL), 0);
    }
    const auto lease = engine->acquire(target, wanted, Deadline::after_ms(20000));
    ASSERT_TRUE(lease) << lease.error().to_string();
    ASSERT_EQ(lease->sources.size(), 1U);
    EXPECT_EQ(lease->sources[0].name, "raw");
    EXPECT_EQ(lease->sources[0].kind, "hf_raw");
    EXPECT_EQ(lease->sources[0].metadata, (Metadata{{"run", "x"}}));
    EXPECT_EQ(lease->sources[0].version_metadata, (Metadata{{"step", "40"}}));
    EXPECT_EQ(lease->sources[0].revision, kRevision);
    ASSERT_EQ(lease->refused.size(), 1U);
    EXPECT_EQ(lease->refused[0].source, "packed");
    EXPECT_THAT(lease->refused[0].reason, HasSubstr("cutlass_fp8"));
    EXPECT_TRUE(engine->release(lease->id, {}, Deadline::after_ms(5000)));
  }
  const auto versions = engine->versions("policy").value();
  EXPECT_EQ(versions.back().revision, kRevision);
  EXPECT_EQ(versions.back().metadata, (Metadata{{"step", "40"}}));

  VersionRequest nobody = wanted;
  nobody.demand.kinds = {"trtllm"};
  const auto refused = engine->acquire(target, nobody, Deadline::after_ms(300));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kNoFittingSource);
  EXPECT_THAT(refused.error().message, HasSubstr("'raw': its kind is 'hf_raw'"));
}

TEST_F(DemandOverRpc, I13_WhatIsTooLargeIsRefusedByTheCoordinator) {
  auto control = connect();
  const Metadata large{{"k", std::string(kMaxMetadataValueBytes + 1, 'v')}};
  EXPECT_EQ(join_with(*control, "a", "hf_raw", large).error().code, ErrorCode::kInvalidArgument);
  const MemberId target = join_as(*control, MemberRole::kTarget, "engine0").value();
  const VersionRequest many{
      .demand = {.kinds = std::vector<std::string>(kMaxDemandKinds + 1, "k")}};
  EXPECT_EQ(control->acquire(target, many, Deadline::after_ms(5000)).error().code,
            ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace transfuse
