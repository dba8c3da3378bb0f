// Descriptors that stand for memory of others, between real processes: memfds play the handles.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/shm/child_role.h"

namespace transfuse::shm {
namespace {

Deadline soon() { return Deadline::after_ms(30000); }

// A process that offers handles, and a transport that asks it.
class HandlesTest : public testing::Test {
 protected:
  void start(uint64_t count, uint64_t size_bytes) {
    owner_ = std::make_unique<ChildProcess>(std::vector<std::string>{
        "handles", folder_.path(), std::to_string(count), std::to_string(size_bytes)});
    endpoint_ = owner_->hear();
    region_ = RegionId{std::stoull(owner_->hear())};
    transport_ = open_shm_transport(folder_.path()).value();
    peer_ = transport_->connect(endpoint_, "", soon()).value();
  }
  void order(const std::string& line) {
    owner_->say(line);
    ASSERT_EQ(owner_->hear(), "ok");
  }
  Result<void> take(uint64_t index) {
    TRANSFUSE_ASSIGN_OR_RETURN(const MemoryHandle handle,
                               peer_->open_handle(region_, index, soon()));
    const UniqueFd fd(handle.fd);
    EXPECT_EQ(fcntl(fd.get(), F_GETFD), FD_CLOEXEC);
    return {};
  }

  TestFolder folder_;
  std::unique_ptr<ChildProcess> owner_;
  std::string endpoint_;
  RegionId region_{};
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<Peer> peer_;
};

TEST_F(HandlesTest, ThousandsArriveThoughNeitherSideMayHaveMoreThanOneDescriptorAtATime) {
  start(3000, 64);
  order("limit 2");  // the connection of the other reader, and a handle
  const uint64_t before = open_descriptors(owner_->pid());
  ChildProcess reader({"fetch", folder_.path(), endpoint_,
                       std::to_string(static_cast<uint64_t>(region_)), "3000", "64"});
  EXPECT_EQ(reader.hear(), "ok");
  EXPECT_EQ(reader.wait(), 0);
  ASSERT_FALSE(take(3000));  // after it, the server has closed what it sent to the reader
  EXPECT_LE(open_descriptors(owner_->pid()), before + 1);
}

TEST_F(HandlesTest, DescriptorCountsStayFlatOnBothSides) {
  start(4, 4096);
  // A refusal comes after all that was sent before has been closed.
  ASSERT_FALSE(take(4));
  const uint64_t own = open_descriptors(getpid());
  const uint64_t theirs = open_descriptors(owner_->pid());
  for (uint64_t i = 0; i < 1000; ++i) ASSERT_TRUE(take(i % 4));
  ASSERT_FALSE(take(4));
  EXPECT_EQ(open_descriptors(getpid()), own);
  EXPECT_EQ(open_descriptors(owner_->pid()), theirs);
}

TEST_F(HandlesTest, WhatTheMakerRefusesIsTheReadersError) {
  start(3, 4096);
  const auto beyond = take(3);
  ASSERT_FALSE(beyond);
  EXPECT_EQ(beyond.error().code, ErrorCode::kNotFound);
  EXPECT_NE(beyond.error().message.find("handle 3 of 3"), std::string::npos);
  EXPECT_TRUE(take(2)) << "the connection goes on";
}

TEST_F(HandlesTest, AnOwnerWithoutDescriptorsSaysSoAndServesAgainLater) {
  start(3, 4096);
  order("limit 0");
  const auto refused = take(0);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(refused.error().message.find("ulimit -n"), std::string::npos);
  order("limit 1");
  EXPECT_TRUE(take(0));
}

TEST_F(HandlesTest, ReleasedHandlesAreNotFoundAndWhatWasTakenStays) {
  start(3, 4096);
  const MemoryHandle handle = peer_->open_handle(region_, 1, soon()).value();
  const UniqueFd fd(handle.fd);
  order("release");
  EXPECT_EQ(take(1).error().code, ErrorCode::kNotFound);
  std::byte byte{};
  EXPECT_EQ(pread(fd.get(), &byte, 1, 77), 1);
  EXPECT_EQ(byte, pattern(1, 77));
}

TEST_F(HandlesTest, AnOwnerThatIsKilledMidwayGivesATypedError) {
  start(100, 4096);
  for (uint64_t i = 0; i < 50; ++i) ASSERT_TRUE(take(i));
  owner_->signal(SIGKILL);
  EXPECT_EQ(owner_->wait(), -SIGKILL);
  const uint64_t own = open_descriptors(getpid());
  EXPECT_EQ(take(50).error().code, ErrorCode::kUnavailable);
  EXPECT_FALSE(peer_->alive());
  EXPECT_EQ(open_descriptors(getpid()), own);
  // What it left in the folder goes with the next transport that is opened there.
  EXPECT_TRUE(open_shm_transport(folder_.path()));
}

TEST_F(HandlesTest, AnOwnerThatIsStoppedIsAMatterOfTheDeadline) {
  start(100, 4096);
  owner_->signal(SIGSTOP);
  ASSERT_EQ(waitpid(owner_->pid(), nullptr, WUNTRACED), owner_->pid());
  const auto late = peer_->open_handle(region_, 0, Deadline::after_ms(100));
  owner_->signal(SIGCONT);
  EXPECT_EQ(late.error().code, ErrorCode::kDeadlineExceeded);
  EXPECT_TRUE(take(1)) << "the late answer is dropped, with its descriptor";
}

TEST_F(HandlesTest, BytesAndHandlesAreNotTakenForEachOther) {
  start(3, 4096);
  EXPECT_EQ(peer_->open_region({region_, 4096}, soon()).error().code, ErrorCode::kInvalidArgument);
  const auto memory = transport_->allocate(4096).value();
  const auto self = transport_->connect(transport_->endpoint().value(), "", soon()).value();
  EXPECT_EQ(self->open_handle(memory->descriptor().id, 0, soon()).error().code,
            ErrorCode::kNotFound);
  // A region that its reader sees without a read.
  const auto region = self->open_region(memory->descriptor(), soon()).value();
  memory->bytes()[9] = std::byte{42};
  ASSERT_EQ(region->mapped().size(), 4096U);
  EXPECT_EQ(region->mapped()[9], std::byte{42});
  EXPECT_TRUE(region->current());
}

}  // namespace
}  // namespace transfuse::shm
