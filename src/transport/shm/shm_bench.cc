// Reading another process's memory over both routes, beside memcpy of the same bytes by as many
// threads. Arguments: pieces, threads, and whether the source has them in another order.
// TRANSFUSE_BENCH_TINY makes it small.
#include <benchmark/benchmark.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kChunkBytes = uint64_t{1} << 20;  // what a plan cuts to

uint64_t size_bytes() {
  return std::getenv("TRANSFUSE_BENCH_TINY") != nullptr ? uint64_t{4} << 20 : uint64_t{256} << 20;
}

// Memory with every page written.
std::span<std::byte> touched_memory(uint64_t size, int value) {
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TRANSFUSE_CHECK(memory != MAP_FAILED);
  std::memset(memory, value, size);
  return {static_cast<std::byte*>(memory), size};
}

struct Offer {
  char endpoint[256];
  RegionDescriptor sealed;
  RegionDescriptor owned;
};

[[noreturn]] void serve(const std::string& folder, int offers, int stop) {
  auto transport = open_shm_transport(folder, {.allow_any_tracer = true}).value();
  auto sealed = transport->allocate(size_bytes()).value();
  std::memset(sealed->bytes().data(), 1, size_bytes());
  auto owned = transport->register_memory(touched_memory(size_bytes(), 2)).value();
  Offer offer{};
  const std::string endpoint = transport->endpoint().value();
  TRANSFUSE_CHECK(endpoint.size() < sizeof offer.endpoint);
  endpoint.copy(offer.endpoint, endpoint.size());
  offer.sealed = sealed->descriptor();
  offer.owned = owned->descriptor();
  TRANSFUSE_CHECK(write(offers, &offer, sizeof offer) == sizeof offer);
  char byte = 0;
  static_cast<void>(read(stop, &byte, 1));
  sealed.reset();
  owned.reset();
  transport.reset();
  _exit(0);
}

// A process that serves, for the whole run.
class Source {
 public:
  Source() {
    char name[] = "/tmp/tf-shm-bench-XXXXXX";
    TRANSFUSE_CHECK(mkdtemp(name) != nullptr);
    folder_ = name;
    int offers[2];
    int stop[2];
    TRANSFUSE_CHECK(pipe(offers) == 0 && pipe(stop) == 0);
    child_ = fork();
    TRANSFUSE_CHECK(child_ >= 0);
    if (child_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      close(stop[1]);
      serve(folder_, offers[1], stop[0]);
    }
    close(offers[1]);
    close(stop[0]);
    TRANSFUSE_CHECK(read(offers[0], &offer_, sizeof offer_) == sizeof offer_);
    close(offers[0]);
    stop_ = stop[1];
  }
  ~Source() {
    close(stop_);
    waitpid(child_, nullptr, 0);
    std::filesystem::remove_all(folder_);
  }
  const Offer& offer() const { return offer_; }
  const std::string& folder() const { return folder_; }

 private:
  std::string folder_;
  pid_t child_ = -1;
  int stop_ = -1;
  Offer offer_{};
};

const Source& source() {
  static const Source one;
  return one;
}

// `count` pieces of equal size with a gap between them at the target, none of them longer than a
// chunk. A plan has them in the order of the target, mostly that of the source too; `shuffled` is
// the worst case, where neither prefetcher nor page tables help.
std::vector<StridedCopy> pieces(uint64_t count, bool shuffled, std::byte* target) {
  const uint64_t pitch = size_bytes() / count / 64 * 64;
  const uint64_t piece = pitch - 64;
  std::vector<StridedCopy> copies;
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t from = shuffled ? (i * 7919) % count : i;
    for (uint64_t at = 0; at < piece; at += kChunkBytes) {
      StridedCopy copy;
      copy.source_offset_bytes = from * piece + at;
      copy.target = target + i * pitch + at;
      copy.count[2] = static_cast<uint32_t>(std::min(kChunkBytes, piece - at));
      copy.source_stride[2] = copy.target_stride[2] = 1;
      copies.push_back(copy);
    }
  }
  return copies;
}

std::vector<StridedCopy> pieces(const benchmark::State& state, std::byte* target) {
  return pieces(static_cast<uint64_t>(state.range(0)), state.range(2) != 0, target);
}

uint64_t total_bytes(const std::vector<StridedCopy>& copies) {
  uint64_t total = 0;
  for (const StridedCopy& copy : copies) total += copy.target_bytes();
  return total;
}

void read_region(benchmark::State& state, const RegionDescriptor& descriptor) {
  TransportOptions options;
  options.threads = static_cast<uint32_t>(state.range(1));
  auto transport = open_shm_transport(source().folder(), options).value();
  const Deadline deadline = Deadline::after_ms(600000);
  auto peer = transport->connect(source().offer().endpoint, "", deadline).value();
  auto region = peer->open_region(descriptor, deadline).value();
  const std::span<std::byte> target = touched_memory(size_bytes(), 3);
  const auto copies = pieces(state, target.data());
  const auto once = [&] {
    const TicketId ticket = transport->submit({region.get(), copies, {}}).value();
    TRANSFUSE_CHECK(transport->wait_any({&ticket, 1}, deadline));
    transport->finish(ticket).value();
  };
  once();  // the first read maps the pages
  for (auto _ : state) once();
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(total_bytes(copies)));
  munmap(target.data(), target.size());
}

void BM_Memfd(benchmark::State& state) { read_region(state, source().offer().sealed); }
void BM_ProcessVmReadv(benchmark::State& state) { read_region(state, source().offer().owned); }

void BM_Memcpy(benchmark::State& state) {
  const std::span<std::byte> from = touched_memory(size_bytes(), 4);
  const std::span<std::byte> target = touched_memory(size_bytes(), 5);
  const auto copies = pieces(state, target.data());
  const auto threads = static_cast<size_t>(state.range(1));
  const auto share = [&](size_t thread) {
    for (size_t i = copies.size() * thread / threads; i < copies.size() * (thread + 1) / threads;
         ++i) {
      std::memcpy(copies[i].target, from.data() + copies[i].source_offset_bytes,
                  copies[i].count[2]);
    }
  };
  for (auto _ : state) {
    std::vector<std::thread> others;
    for (size_t t = 1; t < threads; ++t) others.emplace_back(share, t);
    share(0);
    for (std::thread& other : others) other.join();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(total_bytes(copies)));
  munmap(from.data(), from.size());
  munmap(target.data(), target.size());
}

void shapes(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"pieces", "threads", "shuffled"})
      ->UseRealTime()
      ->MeasureProcessCPUTime()
      ->Unit(benchmark::kMillisecond);
  for (const int64_t threads : {1, 2}) {
    for (const int64_t count : {1, 398, 18867}) benchmark->Args({count, threads, 0});
    benchmark->Args({18867, threads, 1});
  }
}
BENCHMARK(BM_Memcpy)->Apply(shapes);
BENCHMARK(BM_Memfd)->Apply(shapes);
BENCHMARK(BM_ProcessVmReadv)->Apply(shapes);

}  // namespace
}  // namespace transfuse
