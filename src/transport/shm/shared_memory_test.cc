// Memory that peers can read but not write, and limits that are found before they hurt.
#include "transport/shm/shared_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include "base/memory_room.h"
#include "transfuse/result.h"
#include "transport/shm/child_role.h"

namespace transfuse::shm {
namespace {

TEST(SharedMemory, IsZeroedAndWritableByItsOwner) {
  const auto memory = create_shared_memory(10000).value();
  const std::span<std::byte> bytes(memory.mapping.data(), memory.mapping.size_bytes());
  EXPECT_EQ(bytes.size(), 10000u);
  EXPECT_TRUE(
      std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; }));
  std::fill(bytes.begin(), bytes.end(), std::byte{7});
  const auto peer = map_peer_memory(memory.fd, 10000).value();
  EXPECT_EQ(peer.data()[9999], std::byte{7});
}

TEST(SharedMemory, HasEveryPageReservedBeforeItIsHandedOut) {
  const uint64_t size = uint64_t{5} << 20;
  const auto memory = create_shared_memory(size).value();
  std::vector<unsigned char> resident(size / 4096);
  ASSERT_EQ(mincore(memory.mapping.data(), size, resident.data()), 0);
  EXPECT_TRUE(std::all_of(resident.begin(), resident.end(), [](auto r) { return (r & 1) != 0; }));
}

TEST(SharedMemory, I13_NobodyCanMapItForWritingShrinkItOrWriteIntoIt) {
  const auto memory = create_shared_memory(8192).value();
  const int fd = memory.fd.get();
  EXPECT_EQ(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  const auto peer = map_peer_memory(memory.fd, 8192).value();
  EXPECT_EQ(mprotect(peer.data(), 8192, PROT_READ | PROT_WRITE), -1);
  EXPECT_EQ(pwrite(fd, "x", 1, 0), -1);
  EXPECT_EQ(ftruncate(fd, 4096), -1);
  EXPECT_EQ(ftruncate(fd, 16384), -1);
  EXPECT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  // A second descriptor of the same memory, opened for writing, does not help.
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  const UniqueFd again(open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(again);
  EXPECT_EQ(mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, again.get(), 0), MAP_FAILED);
}

TEST(SharedMemory, I13_AReaderRefusesMemoryThatCouldShrinkUnderIt) {
  const UniqueFd fd(memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(fd.get(), 4096), 0);
  EXPECT_EQ(map_peer_memory(fd, 4096).error().code, ErrorCode::kCorrupt);
  ASSERT_EQ(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  EXPECT_EQ(map_peer_memory(fd, 4096).error().code, ErrorCode::kCorrupt) << "others may write";
  ASSERT_EQ(fcntl(fd.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE), 0);
  EXPECT_TRUE(map_peer_memory(fd, 4096));
}

TEST(SharedMemory, I13_AReaderRefusesAnotherSizeAndOtherKindsOfDescriptors) {
  const auto memory = create_shared_memory(8192).value();
  EXPECT_EQ(map_peer_memory(memory.fd, 8193).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(map_peer_memory(memory.fd, 4096).error().code, ErrorCode::kCorrupt);
  EXPECT_EQ(map_peer_memory(memory.fd, 0).error().code, ErrorCode::kCorrupt);
  const UniqueFd file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  EXPECT_EQ(map_peer_memory(file, 4096).error().code, ErrorCode::kCorrupt);
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd reading(ends[0]);
  const UniqueFd writing(ends[1]);
  EXPECT_EQ(map_peer_memory(reading, 4096).error().code, ErrorCode::kCorrupt);
}

TEST(SharedMemory, RefusesMoreThanTheHostHasInsteadOfBeingKilled) {
  const uint64_t room = memory_room().size_bytes;
  ASSERT_LT(room, UINT64_MAX);
  for (const uint64_t size : {room + 4096, room, 100 * room, uint64_t{1} << 62}) {
    const auto memory = create_shared_memory(size);
    ASSERT_FALSE(memory);
    EXPECT_EQ(memory.error().code, ErrorCode::kResourceExhausted);
    EXPECT_NE(memory.error().message.find("expected room for"), std::string::npos);
    EXPECT_NE(memory.error().message.find("found"), std::string::npos);
  }
  EXPECT_EQ(create_shared_memory(0).error().code, ErrorCode::kInvalidArgument);
}

TEST(SharedMemory, NamesTheFileSizeLimitInsteadOfDyingOfItsSignal) {
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 65536;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto memory = create_shared_memory(65537);
  const auto fits = create_shared_memory(65536);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  ASSERT_FALSE(memory);
  EXPECT_EQ(memory.error().code, ErrorCode::kResourceExhausted);
  EXPECT_NE(memory.error().message.find("RLIMIT_FSIZE"), std::string::npos);
  EXPECT_TRUE(fits);
}

TEST(SharedMemory, LeavesNeitherDescriptorsNorMappings) {
  static_cast<void>(create_shared_memory(4096).value());
  const uint64_t descriptors = open_descriptors(getpid());
  const uint64_t maps = mappings(getpid());
  const int rounds = 200;
  for (int i = 0; i < rounds; ++i) {
    const auto memory = create_shared_memory(4096).value();
    static_cast<void>(map_peer_memory(memory.fd, 4096).value());
    static_cast<void>(map_peer_memory(memory.fd, 4097));
  }
  EXPECT_EQ(open_descriptors(getpid()), descriptors);
  // A leak would be one a round; the allocator, a sanitizer's above all, may map a few for itself.
  EXPECT_LT(mappings(getpid()), maps + rounds / 2);
}

}  // namespace
}  // namespace transfuse::shm
