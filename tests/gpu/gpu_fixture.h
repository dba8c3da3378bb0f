// A reader on the first GPU and processes that it reads; every test is skipped where there is no
// GPU.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse {

inline Deadline soon() { return Deadline::after_ms(20000); }

// A child process with a GPU, spoken to line by line.
class GpuPeer {
 public:
  GpuPeer(const std::string& folder, int device) {
    std::array<int, 2> in{};
    std::array<int, 2> out{};
    // No peer holds another's ends.
    TRANSFUSE_CHECK(pipe2(in.data(), O_CLOEXEC) == 0 && pipe2(out.data(), O_CLOEXEC) == 0);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], 0);
      dup2(out[1], 1);
      const std::string ordinal = std::to_string(device);
      execl(TRANSFUSE_GPU_PEER, TRANSFUSE_GPU_PEER, folder.c_str(), ordinal.c_str(), nullptr);
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    to_ = fdopen(in[1], "w");
    from_ = fdopen(out[0], "r");
    endpoint_ = line();
  }
  ~GpuPeer() {
    (void)std::fclose(to_);
    (void)std::fclose(from_);
    (void)waitpid(pid_, nullptr, 0);
  }
  GpuPeer(const GpuPeer&) = delete;
  GpuPeer& operator=(const GpuPeer&) = delete;

  const std::string& endpoint() const { return endpoint_; }
  std::string ask(const std::string& command) {
    (void)std::fprintf(to_, "%s\n", command.c_str());
    (void)std::fflush(to_);
    return line();
  }
  RegionDescriptor allocate(uint64_t bytes, uint64_t seed) {
    return region_of(fmt::format("allocate {} {}", bytes, seed));
  }
  // A region of what `command` made, or what the peer says instead.
  RegionDescriptor region_of(const std::string& command) {
    unsigned long long id = 0;
    unsigned long long size = 0;
    const std::string answer = ask(command);
    EXPECT_EQ(std::sscanf(answer.c_str(), "%llu %llu", &id, &size), 2) << command << ": " << answer;
    return {.id = RegionId{id}, .size_bytes = size};
  }
  pid_t pid() const { return pid_; }
  void kill_it() { (void)kill(pid_, SIGKILL); }

 private:
  std::string line() {
    std::array<char, 512> buffer{};
    if (std::fgets(buffer.data(), buffer.size(), from_) == nullptr) return {};
    std::string text = buffer.data();
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  }

  pid_t pid_ = -1;
  std::FILE* to_ = nullptr;
  std::FILE* from_ = nullptr;
  std::string endpoint_;
};

class CudaTransportTest : public testing::Test {
 protected:
  void SetUp() override {
    auto driver = cuda::Driver::load();
    if (!driver) GTEST_SKIP() << driver.error().message;
    device_ = cuda::Device::open(**driver, 0).value();
    (void)(*driver)->cuDeviceGetCount(&device_count_);
    std::string name = (std::filesystem::temp_directory_path() / "tf-gpu-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    transport_ = open_cuda_transport(open_shm_transport(folder_).value(), 0).value();
    stream_ = cuda::Stream::create(*device_).value();
  }
  void TearDown() override {
    target_ = cuda::Memory();
    transport_.reset();
    if (!folder_.empty()) std::filesystem::remove_all(folder_);
  }

  // A read of the whole region into target_, in pieces.
  std::vector<StridedCopy> whole(uint64_t size, uint32_t piece, bool fingerprint) {
    if (target_.size_bytes() != size) {
      target_ = cuda::Memory::allocate(*device_, cuda::MemoryKind::kDevice, size).value();
    }
    std::vector<StridedCopy> copies;
    for (uint64_t at = 0; at < size; at += piece) {
      copies.push_back(
          {.source_offset_bytes = at,
           .target = target_.as<std::byte>() + at,
           .linear_index = at,
           .fingerprint_key = 7,
           .count = {1, 1, static_cast<uint32_t>(std::min<uint64_t>(piece, size - at))},
           .op = ElementOp::kCopy1,
           .fingerprint = fingerprint,
           .source_stride = {0, 0, 1},
           .target_stride = {0, 0, 1},
           .index_stride = {0, 0, 1}});
    }
    return copies;
  }
  Result<void> read(const RemoteRegion& region, std::span<const StridedCopy> copies,
                    std::span<uint64_t> sums = {}) {
    TRANSFUSE_ASSIGN_OR_RETURN(
        const TicketId ticket,
        transport_->submit({.region = &region, .copies = copies, .fingerprints = sums}));
    if (!transport_->wait_any({&ticket, 1}, soon())) {
      return Error{ErrorCode::kDeadlineExceeded, "the read did not end"};
    }
    return transport_->finish(ticket);
  }
  std::vector<std::byte> held() {
    std::vector<std::byte> bytes(target_.size_bytes());
    const cuda::Current current = device_->use();
    const auto& driver = device_->driver();
    EXPECT_EQ(driver.cuMemcpyAsync(reinterpret_cast<CUdeviceptr>(bytes.data()), target_.address(),
                                   bytes.size(), stream_.get()),
              CUDA_SUCCESS);
    EXPECT_EQ(driver.cuStreamSynchronize(stream_.get()), CUDA_SUCCESS);
    return bytes;
  }
  uint64_t free_bytes() {
    size_t free = 0;
    size_t total = 0;
    const cuda::Current current = device_->use();
    EXPECT_EQ(device_->driver().cuMemGetInfo(&free, &total), CUDA_SUCCESS);
    return free;
  }

  // tests/fake_cuda: slower, and nobody sees how much memory others use.
  bool pretends() const { return device_->name() == "GPU of the host, for tests"; }

  std::unique_ptr<cuda::Device> device_;
  int device_count_ = 0;
  std::string folder_;
  std::unique_ptr<Transport> transport_;
  cuda::Stream stream_;
  cuda::Memory target_;
};

}  // namespace transfuse
