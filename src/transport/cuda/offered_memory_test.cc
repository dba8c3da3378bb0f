// Offers that follow the memory, and handles that are taken from them, without a GPU: memfds play
// the physical allocations and a table plays the driver.
#include "transport/cuda/offered_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "base/unique_fd.h"
#include "transfuse/deadline.h"
#include "transfuse/region.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/imported_memory.h"
#include "transport/cuda/memory_offer.h"
#include "transport/cuda/offer_board.h"
#include "transport/cuda/physical_memory.h"

namespace transfuse::cuda {
namespace {

constexpr uint64_t kPage = uint64_t{2} << 20;
constexpr uint64_t kBase = 0x7000'0000'0000;

Deadline soon() { return Deadline::after_ms(20000); }

uint64_t open_descriptors() {
  uint64_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    ++count;
  return count;
}

// What is mapped from kBase on, as a driver would say. Safe to call from any thread.
class World {
 public:
  void map(uint64_t count, Sharing sharing = Sharing::kHandles) {
    const MutexLock lock(mutex_);
    backing_ = Backing{.sharing = sharing, .ranges = {}};
    for (uint64_t i = 0; i < count; ++i) {
      ++last_id_;
      backing_->ranges.push_back({.address = kBase + i * kPage,
                                  .size_bytes = kPage,
                                  .buffer_id = last_id_,
                                  .block_id = last_id_});
    }
  }
  void unmap() {
    const MutexLock lock(mutex_);
    backing_.reset();
  }
  Result<Backing> find() const {
    const MutexLock lock(mutex_);
    if (backing_) return *backing_;
    return Error{ErrorCode::kUnavailable, "nothing is mapped"};
  }
  // A file whose first word is the allocation's number.
  Result<MemoryHandle> share(const PhysicalRange& range) const {
    const MutexLock lock(mutex_);
    bool mapped = false;
    for (size_t i = 0; backing_ && i < backing_->ranges.size(); ++i)
      mapped = mapped || backing_->ranges[i] == range;
    if (!mapped) return Error{ErrorCode::kNotFound, "mapped anew"};
    const int fd = memfd_create("allocation", MFD_CLOEXEC);
    EXPECT_EQ(pwrite(fd, &range.block_id, sizeof(range.block_id), 0), 8);
    return MemoryHandle{.fd = fd, .size_bytes = range.size_bytes};
  }

 private:
  mutable Mutex mutex_;
  std::optional<Backing> backing_ GUARDED_BY(mutex_);
  uint64_t last_id_ GUARDED_BY(mutex_) = 0;
};

class PlayedMemory final : public PhysicalMemory {
 public:
  explicit PlayedMemory(const World& world) : world_(world) {}
  Result<Backing> find(std::span<const std::byte> /*memory*/) const override {
    return world_.find();
  }
  bool unchanged(const Backing& backing) const override {
    const auto found = world_.find();
    return found && found->ranges == backing.ranges;
  }
  Result<CUipcMemHandle> ipc_handle(const PhysicalRange& range) const override {
    CUipcMemHandle handle{};
    handle.reserved[0] = static_cast<char>(range.block_id);
    return handle;
  }
  Result<MemoryHandle> share(const PhysicalRange& range) const override {
    return world_.share(range);
  }

 private:
  const World& world_;
};

class OfferedMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "tf-offer-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    host_ = open_shm_transport(folder_).value();
    boards_ = std::make_unique<OfferBoards>(*host_);
    reader_ = open_shm_transport(folder_).value();
    peer_ = reader_->connect(host_->endpoint().value(), "", soon()).value();
  }
  void TearDown() override {
    board_.reset();
    peer_.reset();
    reader_.reset();
    offered_.reset();
    boards_.reset();
    host_.reset();
    EXPECT_TRUE(std::filesystem::is_empty(folder_));
    std::filesystem::remove_all(folder_);
  }

  Result<void> offer(uint64_t size_bytes) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        offered_, OfferedMemory::open(*host_, *boards_, std::make_unique<PlayedMemory>(world_),
                                      {.process = 5}, memory(size_bytes)));
    return {};
  }
  static std::span<std::byte> memory(uint64_t size_bytes) {
    return {reinterpret_cast<std::byte*>(kBase + 100), size_bytes};  // never touched
  }
  // As a reader sees it.
  std::span<const std::byte, kOfferBytes> place() {
    const auto at = offer_place(offered_->descriptor().id).value();
    if (board_ == nullptr) {
      board_ = peer_->open_region({at.board, kBoardBytes}, soon()).value();
    }
    return board_->mapped().subspan(at.slot * kOfferBytes).first<kOfferBytes>();
  }
  // The numbers of the allocations that a reader gets, in order.
  Result<std::vector<uint64_t>> take() {
    TRANSFUSE_ASSIGN_OR_RETURN(const MemoryOffer offer, read_offer(place(), soon()));
    std::vector<uint64_t> numbers;
    const auto give = [&](uint64_t index) {
      return peer_->open_handle(offer.handles, index, soon());
    };
    TRANSFUSE_RETURN_IF_ERROR(
        take_handles(offer, give, [&](uint64_t offset, const MemoryHandle& handle) -> Result<void> {
          EXPECT_EQ(offset, numbers.size() * kPage);
          uint64_t number = 0;
          EXPECT_EQ(pread(handle.fd, &number, sizeof(number), 0), 8);
          numbers.push_back(number);
          return {};
        }));
    return numbers;
  }

  std::string folder_;
  World world_;
  std::unique_ptr<Transport> host_;
  std::unique_ptr<OfferBoards> boards_;
  std::unique_ptr<OfferedMemory> offered_;
  std::unique_ptr<Transport> reader_;
  std::unique_ptr<Peer> peer_;
  std::unique_ptr<RemoteRegion> board_;
};

TEST_F(OfferedMemoryTest, AllHandlesOfALongSpanArriveInOrderAndNoneStaysOpen) {
  world_.map(2000);
  ASSERT_TRUE(offer(2000 * kPage - 200));
  const MemoryOffer offer = read_offer(place(), soon()).value();
  EXPECT_EQ(offer.process, 5U);
  EXPECT_EQ(offer.offset_bytes, 100U);
  EXPECT_EQ(offer.allocation_bytes, 2000 * kPage);
  EXPECT_EQ(offer.handle_count, 2000U);
  ASSERT_EQ(take()->size(), 2000U);
  const uint64_t before = open_descriptors();
  const auto numbers = take().value();
  for (uint64_t i = 0; i < 2000; ++i) ASSERT_EQ(numbers[i], i + 1);
  EXPECT_LE(open_descriptors(), before + 1) << "at most the last one is just being closed";
}

TEST_F(OfferedMemoryTest, MemoryThatWasMappedAnewIsAnotherOfferAfterTheNextLook) {
  world_.map(3);
  ASSERT_TRUE(offer(3 * kPage - 200));
  const uint64_t first = offered_identity(place());
  ASSERT_TRUE(offered_->refresh());
  EXPECT_EQ(offered_identity(place()), first) << "nothing changed";
  world_.map(3);  // other pages at the same address
  ASSERT_TRUE(offered_->refresh());
  EXPECT_NE(offered_identity(place()), first);
  EXPECT_EQ(take().value(), (std::vector<uint64_t>{4, 5, 6}));
  const RegionDescriptor same = offered_->descriptor();
  EXPECT_EQ(same.size_bytes, 3 * kPage - 200);
}

TEST_F(OfferedMemoryTest, WhoOpensItFindsWhatIsMappedNowThoughNothingWasPublishedSince) {
  world_.map(3);
  ASSERT_TRUE(offer(3 * kPage - 200));
  const uint64_t first = offered_identity(place());
  world_.map(3);
  const auto stale = take();  // by the old offer: the owner looks, and its handles are of the new
  EXPECT_NE(offered_identity(place()), first) << "so that the reader sees that it has to ask again";
  EXPECT_EQ(take().value(), (std::vector<uint64_t>{4, 5, 6}));
}

TEST_F(OfferedMemoryTest, MemoryThatIsMappedAnewWhileItsHandlesAreTakenIsNoticed) {
  world_.map(3);
  ASSERT_TRUE(offer(3 * kPage - 200));
  const MemoryOffer before = read_offer(place(), soon()).value();
  const auto first = peer_->open_handle(before.handles, 0, soon()).value();
  EXPECT_EQ(close(first.fd), 0);
  world_.map(3);
  EXPECT_EQ(peer_->open_handle(before.handles, 1, soon()).error().code, ErrorCode::kNotFound);
  EXPECT_NE(offered_identity(place()), before.identity);
}

TEST_F(OfferedMemoryTest, AnEngineThatSleepsOffersNothingAndWakesWithOtherPages) {
  world_.map(2);
  ASSERT_TRUE(offer(kPage));
  world_.unmap();
  EXPECT_EQ(offered_->refresh().error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(take().error().code, ErrorCode::kNotFound);
  world_.map(2);
  ASSERT_TRUE(offered_->refresh());
  EXPECT_EQ(take().value(), (std::vector<uint64_t>{3, 4}));
}

TEST_F(OfferedMemoryTest, AHandleThatIsAskedForWhileNothingIsMappedIsRefused) {
  world_.map(2);
  ASSERT_TRUE(offer(kPage));
  const MemoryOffer before = read_offer(place(), soon()).value();
  world_.unmap();
  EXPECT_EQ(peer_->open_handle(before.handles, 0, soon()).error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(read_offer(place(), soon()).error().code, ErrorCode::kNotFound);
}

TEST_F(OfferedMemoryTest, TheEndOfTheRegistrationIsSeenByReadersThatHaveItOpen) {
  world_.map(1);
  ASSERT_TRUE(offer(kPage / 2));
  const auto at = place();
  const uint64_t identity = offered_identity(at);
  const MemoryOffer before = read_offer(at, soon()).value();
  offered_.reset();
  EXPECT_NE(offered_identity(at), identity);
  EXPECT_EQ(read_offer(at, soon()).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(peer_->open_handle(before.handles, 0, soon()).error().code, ErrorCode::kNotFound);
}

TEST_F(OfferedMemoryTest, MemoryOfCudaMallocCarriesItsHandleInTheOffer) {
  world_.map(1, Sharing::kIpcHandle);
  ASSERT_TRUE(offer(kPage / 2));
  const MemoryOffer first = read_offer(place(), soon()).value();
  EXPECT_EQ(first.handle_count, 0U);
  EXPECT_EQ(first.ipc_handle.reserved[0], 1);
  world_.map(1, Sharing::kIpcHandle);
  ASSERT_TRUE(offered_->refresh());
  const MemoryOffer second = read_offer(place(), soon()).value();
  EXPECT_NE(second.identity, first.identity);
  EXPECT_EQ(second.ipc_handle.reserved[0], 2);
  world_.map(1, Sharing::kHandles);
  EXPECT_EQ(offered_->refresh().error().code, ErrorCode::kUnsupported);
}

TEST_F(OfferedMemoryTest, I3_AThousandRegionsCostFourDescriptorsAndNumbersAreNotUsedTwice) {
  world_.map(1);
  std::set<uint64_t> numbers;
  for (int round = 0; round < 3; ++round) {
    const uint64_t before = open_descriptors();
    const TransportStats stats = host_->stats();
    std::vector<std::unique_ptr<OfferedMemory>> many;
    for (int i = 0; i < 1000; ++i) {
      ASSERT_TRUE(offer(kPage / 2));
      ASSERT_TRUE(numbers.insert(static_cast<uint64_t>(offered_->descriptor().id)).second);
      many.push_back(std::move(offered_));
    }
    EXPECT_LE(open_descriptors(), before + 5);
    many.clear();
    EXPECT_LE(open_descriptors(), before + 1);
    EXPECT_LE(host_->stats().regions, stats.regions + 1);
  }
}

TEST(OfferPlace, NumbersOfDeviceRegionsComeBackAndAreNoneOfTheHosts) {
  for (const OfferPlace place : {OfferPlace{RegionId{1}, 0}, OfferPlace{RegionId{1}, 255},
                                 OfferPlace{RegionId{(uint64_t{1} << 48) - 1}, 77}}) {
    EXPECT_EQ(offer_place(device_region(place)), place);
  }
  EXPECT_FALSE(offer_place(RegionId{1}));
  EXPECT_FALSE(offer_place(RegionId{uint64_t{1} << 62}));
}

// A peer that gives `sizes`, whatever it offered.
struct Given {
  Result<void> outcome;
  uint64_t taken = 0;
};
Given take_sizes(const MemoryOffer& offer, const std::vector<uint64_t>& sizes) {
  Given given;
  const auto give = [&](uint64_t index) -> Result<MemoryHandle> {
    if (index >= sizes.size()) return Error{ErrorCode::kUnavailable, "the peer is gone"};
    return MemoryHandle{.fd = memfd_create("handle", MFD_CLOEXEC), .size_bytes = sizes[index]};
  };
  given.outcome =
      take_handles(offer, give, [&](uint64_t /*offset*/, const MemoryHandle&) -> Result<void> {
        ++given.taken;
        return {};
      });
  return given;
}

TEST(TakeHandles, I13_LengthsThatDoNotMakeUpTheAllocationsAreCorrupt) {
  const MemoryOffer offer{.allocation_bytes = 3 * kPage, .size_bytes = kPage, .handle_count = 2};
  const uint64_t before = open_descriptors();
  EXPECT_TRUE(take_sizes(offer, {kPage, 2 * kPage}).outcome);
  const std::vector<std::vector<uint64_t>> lies = {
      {kPage, kPage},                  // too little
      {kPage, 3 * kPage},              // too much
      {4 * kPage, kPage},              // the first alone
      {3 * kPage, kPage},              // nothing is left for the second
      {0, 3 * kPage},                  // nothing
      {kPage + 1, 2 * kPage - 1},      // no pages
      {UINT64_MAX, 2 * kPage},         // wraps
      {UINT64_MAX - kPage + 1, kPage}  // wraps to what is left
  };
  for (const auto& sizes : lies) {
    const Given given = take_sizes(offer, sizes);
    ASSERT_FALSE(given.outcome) << sizes[0];
    EXPECT_EQ(given.outcome.error().code, ErrorCode::kCorrupt) << given.outcome.error().message;
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(TakeHandles, APeerThatDiesMidwayEndsItWithItsErrorAndNoDescriptorStays) {
  const MemoryOffer offer{.allocation_bytes = 5 * kPage, .size_bytes = kPage, .handle_count = 5};
  const uint64_t before = open_descriptors();
  const Given given = take_sizes(offer, {kPage, kPage});
  EXPECT_EQ(given.outcome.error().code, ErrorCode::kUnavailable);
  EXPECT_EQ(given.taken, 2U);
  EXPECT_EQ(open_descriptors(), before);
}

TEST(CannotOpen, NamesWhatAContainerLacksAndOffersMemoryOfTheHost) {
  const Error driver{ErrorCode::kInvalidArgument, "cuIpcOpenMemHandle: CUDA_ERROR_INVALID_VALUE"};
  const Error ipc = cannot_open(driver, MemoryOffer{});
  EXPECT_EQ(ipc.code, ErrorCode::kPermissionDenied);
  for (const char* words : {"CUDA_ERROR_INVALID_VALUE", "--ipc=host", "one user", "device None"}) {
    EXPECT_NE(ipc.message.find(words), std::string::npos) << words;
  }
  const Error handles = cannot_open(driver, MemoryOffer{.handle_count = 1});
  EXPECT_EQ(handles.message.find("--ipc=host"), std::string::npos) << "descriptors need it not";
  EXPECT_NE(handles.message.find("device None"), std::string::npos);
  const Error full{ErrorCode::kResourceExhausted, "cuMemMap: CUDA_ERROR_OUT_OF_MEMORY"};
  EXPECT_EQ(cannot_open(full, MemoryOffer{}).code, ErrorCode::kResourceExhausted);
  const Error lost{ErrorCode::kUnavailable, "the CUDA context of this process is lost"};
  EXPECT_EQ(cannot_open(lost, MemoryOffer{}).message, lost.message);
}

}  // namespace
}  // namespace transfuse::cuda
