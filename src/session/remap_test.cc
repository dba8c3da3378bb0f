// Engines that sleep and wake with other memory at the same addresses: their readers open it anew.
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "session/refit_world.h"
#include "transfuse/deadline.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

using testing::Engine;
using testing::layouts;
using testing::Trainer;
using testing::value_or_fail;

// Memory that its owner can map anew, around a transport whose memory stays. All that callers own
// is mapped anew, and sleeps, at once. Safe to call from any thread.
class RemappingTransport final : public Transport {
 public:
  explicit RemappingTransport(std::unique_ptr<Transport> inside) : inside_(std::move(inside)) {}

  void remap() { ++mapped_; }
  void sleep(bool asleep) { asleep_ = asleep; }
  uint64_t opened() const { return opened_; }    // regions, since the beginning
  uint64_t refused() const { return refused_; }  // reads of memory that is not there any more

  std::string_view kind() const override { return inside_->kind(); }
  Result<std::unique_ptr<LocalRegion>> allocate(uint64_t size_bytes) override {
    return inside_->allocate(size_bytes);
  }
  Result<std::unique_ptr<LocalRegion>> register_memory(std::span<std::byte> memory) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto inside, inside_->register_memory(memory));
    return std::unique_ptr<LocalRegion>(std::make_unique<Owned>(*this, std::move(inside)));
  }
  Result<std::string> endpoint() override { return inside_->endpoint(); }
  Result<std::unique_ptr<Peer>> connect(std::string_view endpoint, std::string_view token,
                                        Deadline deadline) override {
    TRANSFUSE_ASSIGN_OR_RETURN(auto inside, inside_->connect(endpoint, token, deadline));
    return std::unique_ptr<Peer>(std::make_unique<OpeningPeer>(*this, std::move(inside)));
  }
  Result<TicketId> submit(const ReadRequest& request) override {
    const auto* region = dynamic_cast<const Opened*>(request.region);
    if (!region->current()) {
      ++refused_;
      return Error{ErrorCode::kTornRead, "mapped anew since it was opened"};
    }
    ReadRequest inner = request;
    inner.region = region->inside();
    const auto* scales = dynamic_cast<const Opened*>(request.scale_region);
    if (scales != nullptr) inner.scale_region = scales->inside();
    return inside_->submit(inner);
  }
  TicketState poll(TicketId ticket) override { return inside_->poll(ticket); }
  bool wait_any(std::span<const TicketId> tickets, Deadline deadline) override {
    return inside_->wait_any(tickets, deadline);
  }
  uint64_t progress_bytes(TicketId ticket) override { return inside_->progress_bytes(ticket); }
  void cancel(TicketId ticket) override { inside_->cancel(ticket); }
  Result<void> finish(TicketId ticket) override { return inside_->finish(ticket); }
  TransportStats stats() const override { return inside_->stats(); }

 private:
  class Owned final : public LocalRegion {
   public:
    Owned(RemappingTransport& transport, std::unique_ptr<LocalRegion> inside)
        : transport_(transport), inside_(std::move(inside)) {}
    std::span<std::byte> bytes() const override { return inside_->bytes(); }
    RegionDescriptor descriptor() const override { return inside_->descriptor(); }
    Result<void> refresh() override {
      if (transport_.asleep_) return Error{ErrorCode::kUnavailable, "nothing is mapped there now"};
      transport_.told_ = transport_.mapped_.load();
      return {};
    }

   private:
    RemappingTransport& transport_;
    std::unique_ptr<LocalRegion> inside_;
  };
  class Opened final : public RemoteRegion {
   public:
    Opened(RemappingTransport& transport, std::unique_ptr<RemoteRegion> inside)
        : transport_(transport), inside_(std::move(inside)), told_(transport.told_) {}
    uint64_t size_bytes() const override { return inside_->size_bytes(); }
    std::string_view route() const override { return inside_->route(); }
    // Memory that the transport allocated, the generation's words, is never mapped anew.
    bool current() const override {
      return !inside_->mapped().empty() || told_ == transport_.told_;
    }
    const RemoteRegion* inside() const { return inside_.get(); }

   private:
    RemappingTransport& transport_;
    std::unique_ptr<RemoteRegion> inside_;
    const uint64_t told_;
  };
  class OpeningPeer final : public Peer {
   public:
    OpeningPeer(RemappingTransport& transport, std::unique_ptr<Peer> inside)
        : transport_(transport), inside_(std::move(inside)) {}
    Result<std::unique_ptr<RemoteRegion>> open_region(const RegionDescriptor& descriptor,
                                                      Deadline deadline) override {
      TRANSFUSE_ASSIGN_OR_RETURN(auto inside, inside_->open_region(descriptor, deadline));
      ++transport_.opened_;
      return std::unique_ptr<RemoteRegion>(std::make_unique<Opened>(transport_, std::move(inside)));
    }
    bool alive() const override { return inside_->alive(); }

   private:
    RemappingTransport& transport_;
    std::unique_ptr<Peer> inside_;
  };

  std::unique_ptr<Transport> inside_;
  std::atomic<uint64_t> mapped_{0};  // how often memory was mapped anew
  std::atomic<uint64_t> told_{0};    // which of these readers know of
  std::atomic<bool> asleep_{false};
  std::atomic<uint64_t> opened_{0};
  std::atomic<uint64_t> refused_{0};
};

class Remap : public ::testing::Test {
 protected:
  Remap() : transport_(value_or_fail(open_local_transport(), "transport")) {}

  void start_trainers(std::string_view spec) {
    const auto all = layouts(spec);
    for (size_t i = 0; i < all.size(); ++i) {
      trainers_.push_back(std::make_unique<Trainer>(transport_, *control_, all[i],
                                                    "trainer" + std::to_string(i), all.size()));
    }
  }
  void publish(uint64_t version) {
    for (auto& trainer : trainers_) trainer->publish(version);
  }
  static void expect_refit(Engine& engine, uint64_t version) {
    auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->attempts, 1U);
    EXPECT_TRUE(report->steps.empty());
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
  }

  RemappingTransport transport_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::vector<std::unique_ptr<Trainer>> trainers_;
};

TEST_F(Remap, MemoryThatWasMappedAnewBeforeAVersionIsOpenedAnewForIt) {
  start_trainers("fsdp:dp=2,dtype=f32");
  Engine engine(transport_, *control_, layouts("vllm:tp=1")[0]);
  publish(1);
  expect_refit(engine, 1);
  publish(2);
  const uint64_t warm = transport_.opened();
  expect_refit(engine, 2);
  EXPECT_EQ(transport_.opened(), warm) << "nothing is opened in a warm cycle";
  const TransportStats before = transport_.stats();
  for (uint64_t version = 3; version < 6; ++version) {
    const uint64_t opened = transport_.opened();
    transport_.remap();
    publish(version);
    expect_refit(engine, version);
    EXPECT_GE(transport_.opened(), opened + trainers_.size());
  }
  EXPECT_EQ(transport_.refused(), 0U) << "noticed before anything is read";
  EXPECT_EQ(transport_.stats().remote_regions, before.remote_regions);
}

TEST_F(Remap, ATrainerThatSleepsPublishesNothingAndGoesOnWhenItWakes) {
  start_trainers("fsdp:dp=1,dtype=f32");
  Engine engine(transport_, *control_, layouts("vllm:tp=1")[0]);
  publish(1);
  expect_refit(engine, 1);
  ASSERT_TRUE(trainers_[0]->publisher->begin_write(2));
  trainers_[0]->parameters.write(2);
  transport_.sleep(true);
  EXPECT_EQ(trainers_[0]->publisher->publish(2).error().code, ErrorCode::kUnavailable);
  transport_.sleep(false);
  transport_.remap();
  ASSERT_TRUE(trainers_[0]->publisher->publish(2));
  expect_refit(engine, 2);
}

TEST_F(Remap, NothingIsWrittenIntoAnEngineThatSleeps) {
  start_trainers("fsdp:dp=1,dtype=f32");
  for (const ReceiveInto into : {ReceiveInto::kInPlace, ReceiveInto::kShadow}) {
    ReceiverOptions options;
    options.into = into;
    Engine engine(transport_, *control_, layouts("vllm:tp=1")[0], "engine", options);
    const uint64_t version = trainers_[0]->publisher->version() + 1;
    publish(version);
    transport_.sleep(true);
    engine.parameters.poison(std::byte{0xAB});
    const auto refit = engine.refit();
    ASSERT_FALSE(refit);
    EXPECT_EQ(refit.error().code, ErrorCode::kUnavailable) << refit.error().message;
    EXPECT_NE(engine.parameters.wrong_elements(version), 0);
    transport_.sleep(false);
    auto woken = engine.refit();
    ASSERT_TRUE(woken) << woken.error().to_string();
    EXPECT_EQ(engine.parameters.wrong_elements(version), 0);
  }
}

}  // namespace
}  // namespace transfuse
