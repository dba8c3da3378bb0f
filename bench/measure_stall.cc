// How long a trainer stands still for a version that is being read: in place, and with snapshots;
// and the copy into a snapshot beside memcpy.
#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/affinity.h"
#include "ceiling.h"
#include "fleet.h"
#include "measure.h"
#include "stopwatch.h"
#include "transfuse/control.h"
#include "transfuse/deadline.h"
#include "transfuse/layout.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/versions.h"
#include "weights.h"
#include "workload.h"

namespace transfuse::bench {
namespace {

constexpr int64_t kDeadlineMs = 120000;
constexpr uint32_t kSlots = 2;  // one that is read, one that is written
constexpr auto kPoll = std::chrono::microseconds(100);

// A trainer and an engine in one process, which the engine's reads do not know: they go through
// shared memory as between processes.
class StallWorld {
 public:
  static Result<std::unique_ptr<StallWorld>> open(const Layout& layout);

  // Publishes a version, waits until the engine reads it, and publishes the next one at once.
  // Returns what the trainer waited and copied for that.
  struct Stall {
    double seconds = 0;
    PublishTiming publish;
  };
  Result<Stall> step(Retention retention);
  Weights& weights() { return weights_; }
  double undisturbed_copy_seconds() const { return undisturbed_copy_seconds_; }

 private:
  explicit StallWorld(TemporaryFolder folder) : folder_(std::move(folder)) {}
  Result<void> wait_for_reader(const std::future<Result<RefitReport>>& reading) const;

  TemporaryFolder folder_;
  std::unique_ptr<Control> control_ = open_local_control();
  std::unique_ptr<Transport> transport_;
  Weights weights_;
  Weights target_;
  std::unique_ptr<Publisher> publisher_;
  std::unique_ptr<Receiver> receiver_;
  uint64_t version_ = 0;
  double undisturbed_copy_seconds_ = 0;
};

Result<std::unique_ptr<StallWorld>> StallWorld::open(const Layout& layout) {
  TRANSFUSE_ASSIGN_OR_RETURN(TemporaryFolder folder, TemporaryFolder::make());
  std::unique_ptr<StallWorld> world(new StallWorld(std::move(folder)));
  TRANSFUSE_ASSIGN_OR_RETURN(world->transport_, open_shm_transport(world->folder_.path()));
  TRANSFUSE_ASSIGN_OR_RETURN(world->weights_, Weights::allocate(layout, world->transport_.get()));
  TRANSFUSE_ASSIGN_OR_RETURN(world->target_, Weights::allocate(layout, nullptr));
  PublisherOptions options;
  options.name = "trainer";
  options.drain_ms = kDeadlineMs;
  options.arenas = {world->weights_.arena()};
  options.snapshot_slots = kSlots;
  options.when_leased = WhenLeased::kWait;
  TRANSFUSE_ASSIGN_OR_RETURN(world->publisher_,
                             Publisher::open(*world->transport_, *world->control_, layout,
                                             world->weights_.memory(), options));
  ReceiverOptions receiving;
  receiving.name = "engine";
  TRANSFUSE_ASSIGN_OR_RETURN(world->receiver_,
                             Receiver::open(*world->transport_, *world->control_, layout,
                                            world->target_.memory(), receiving));
  return world;
}

Result<void> StallWorld::wait_for_reader(const std::future<Result<RefitReport>>& reading) const {
  while (reading.wait_for(kPoll) != std::future_status::ready) {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto versions, control_->versions("model"));
    for (const VersionInfo& info : versions) {
      if (info.version == version_ && info.leases > 0) return {};
    }
  }
  return {};
}

Result<StallWorld::Stall> StallWorld::step(Retention retention) {
  TRANSFUSE_RETURN_IF_ERROR(publisher_->set_retention(retention));
  TRANSFUSE_RETURN_IF_ERROR(publisher_->begin_write(++version_));
  weights_.touch(version_);
  TRANSFUSE_ASSIGN_OR_RETURN(const PublishTiming first, publisher_->publish(version_));
  undisturbed_copy_seconds_ = static_cast<double>(first.copy_us) / 1e6;
  auto reading = std::async(std::launch::async, [this, version = version_] {
    return receiver_->refit({VersionRequest::Kind::kExactly, version},
                            Deadline::after_ms(kDeadlineMs));
  });
  TRANSFUSE_RETURN_IF_ERROR(wait_for_reader(reading));

  Stall stall;
  const Stopwatch begin_watch;
  TRANSFUSE_RETURN_IF_ERROR(publisher_->begin_write(++version_));
  stall.seconds = begin_watch.seconds();
  weights_.touch(version_);  // the step itself: not counted
  const Stopwatch publish_watch;
  TRANSFUSE_ASSIGN_OR_RETURN(stall.publish, publisher_->publish(version_));
  stall.seconds += publish_watch.seconds();
  auto report = reading.get();
  if (!report) return Unexpected{std::move(report).error()};
  // The engine has the last version too, and all sums are made, before the next step.
  TRANSFUSE_RETURN_IF_ERROR(receiver_->refit({VersionRequest::Kind::kExactly, version_},
                                             Deadline::after_ms(kDeadlineMs)));
  return stall;
}

}  // namespace

Result<void> measure_stall(const Options& options, const Sink& sink) {
  const uint64_t total_bytes = options.tiny ? uint64_t{16} << 20 : uint64_t{512} << 20;
  TRANSFUSE_ASSIGN_OR_RETURN(const auto layouts, layouts_of(narrow_qwen3_4b(total_bytes), "hf"));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto world, StallWorld::open(layouts[0]));
  const uint32_t threads = usable_core_count();  // those that copy
  TRANSFUSE_ASSIGN_OR_RETURN(const Ceiling ceiling,
                             Ceiling::open(world->weights().size_bytes(), threads));
  constexpr int kWarmUp = 2;
  std::vector<double> in_place_ms, snapshot_ms, memcpy_over_copy, copy_rate;
  for (int i = 0; i < kWarmUp + options.repetitions; ++i) {
    TRANSFUSE_ASSIGN_OR_RETURN(const auto in_place, world->step(Retention::kInPlace));
    TRANSFUSE_ASSIGN_OR_RETURN(const auto snapshot, world->step(Retention::kSnapshot));
    const double memcpy_seconds = ceiling.copy_seconds(world->weights().bytes());
    if (i < kWarmUp) continue;
    in_place_ms.push_back(in_place.seconds * 1e3);
    snapshot_ms.push_back(snapshot.seconds * 1e3);
    memcpy_over_copy.push_back(memcpy_seconds / world->undisturbed_copy_seconds());
    copy_rate.push_back(static_cast<double>(world->weights().size_bytes()) /
                        world->undisturbed_copy_seconds() / 1e9);
  }
  const std::string workload =
      fmt::format("{} MiB, 398 tensors, hf -> hf, one process", total_bytes >> 20);
  const nlohmann::json detail = {{"bytes", world->weights().size_bytes()}, {"threads", threads}};
  sink({"", workload, "stall of a step, in_place, being read", "ms", spread_of(in_place_ms),
        detail});
  sink({"", workload, "stall of a step, snapshot, being read", "ms", spread_of(snapshot_ms),
        detail});
  sink(
      {"", workload, "copy into a snapshot, nobody reading", "GB/s", spread_of(copy_rate), detail});
  sink({"", workload, "memcpy / that copy", "ratio", spread_of(memcpy_over_copy), detail});
  return {};
}

}  // namespace transfuse::bench
