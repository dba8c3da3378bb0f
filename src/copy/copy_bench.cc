// The copy engine beside memcpy: whole spans, rows, casts, fingerprints. Bytes are target bytes
// except where the name says otherwise.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "copy/copy.h"
#include "copy/read_queue.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

// Well beyond any last-level cache; little where the benchmark only runs as a test.
uint64_t span_bytes() {
  return uint64_t{1} << (std::getenv("TRANSFUSE_BENCH_TINY") != nullptr ? 22 : 28);
}
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;

// A source and a target whose pages are there. Used from one thread.
class Memory {
 public:
  Memory() : source_(allocate()), target_(allocate()) {}
  std::byte* source() { return source_.get(); }
  std::byte* target() { return target_.get(); }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  static std::unique_ptr<std::byte, Free> allocate() {
    auto* p = static_cast<std::byte*>(std::aligned_alloc(4096, span_bytes()));
    std::memset(p, 0x3A, span_bytes());
    return std::unique_ptr<std::byte, Free>(p);
  }
  std::unique_ptr<std::byte, Free> source_;
  std::unique_ptr<std::byte, Free> target_;
};

Memory& memory() {
  static Memory instance;
  return instance;
}

std::vector<int64_t> paths() {
  std::vector<int64_t> numbers;
  for (const CopyPath path : kCopyPaths) {
    if (has_copy_path(path)) numbers.push_back(static_cast<int64_t>(path));
  }
  return numbers;
}

StridedCopy contiguous(ElementOp op, uint64_t bytes) {
  StridedCopy copy;
  copy.op = op;
  copy.count[2] = static_cast<uint32_t>(bytes / target_element_bytes(op));
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  return copy;
}

void set_rate(benchmark::State& state, uint64_t bytes) {
  state.SetBytesProcessed(static_cast<int64_t>(bytes) * state.iterations());
}

void memcpy_ceiling(benchmark::State& state) {
  for (auto _ : state) std::memcpy(memory().target(), memory().source(), span_bytes());
  set_rate(state, span_bytes());
}
BENCHMARK(memcpy_ceiling)->Unit(benchmark::kMillisecond);

void memcpy_pieces(benchmark::State& state) {
  const auto piece = static_cast<uint64_t>(state.range(0));
  for (auto _ : state) {
    for (uint64_t at = 0; at < span_bytes(); at += piece) {
      std::memcpy(memory().target() + at, memory().source() + at, piece);
    }
  }
  set_rate(state, span_bytes());
}
BENCHMARK(memcpy_pieces)
    ->RangeMultiplier(8)
    ->Range(512, kPieceBytes)
    ->Unit(benchmark::kMillisecond);

// The span in pieces of 1 MiB, as a plan cuts it. Arguments: op, fingerprint, path.
void pieces(benchmark::State& state) {
  const auto op = static_cast<ElementOp>(state.range(0));
  const auto path = static_cast<CopyPath>(state.range(2));
  force_copy_path(path);
  StridedCopy copy = contiguous(op, kPieceBytes);
  copy.fingerprint = state.range(1) != 0;
  const uint64_t widening = source_element_bytes(op) / target_element_bytes(op);
  const uint64_t total = span_bytes() / widening;
  for (auto _ : state) {
    for (uint64_t at = 0; at < total; at += kPieceBytes) {
      copy.target = memory().target() + at;
      copy.linear_index = at / target_element_bytes(op);
      benchmark::DoNotOptimize(run_copy(copy, memory().source() + at * widening));
    }
    copy_fence();
  }
  force_copy_path(best_copy_path());
  set_rate(state, total);
}
BENCHMARK(pieces)
    ->ArgNames({"op", "fingerprint", "path"})
    ->ArgsProduct({{0, 1, 2, 3, 4, 5}, {0, 1}, paths()})
    ->Unit(benchmark::kMillisecond);

void sum_alone(benchmark::State& state) {
  const auto op = static_cast<ElementOp>(state.range(0));
  const auto path = static_cast<CopyPath>(state.range(1));
  force_copy_path(path);
  StridedCopy copy = contiguous(op, kPieceBytes);
  const uint64_t widening = source_element_bytes(op) / target_element_bytes(op);
  const uint64_t total = span_bytes() / widening;
  for (auto _ : state) {
    for (uint64_t at = 0; at < total; at += kPieceBytes) {
      benchmark::DoNotOptimize(sum_copy(copy, memory().source() + at * widening));
    }
  }
  force_copy_path(best_copy_path());
  set_rate(state, total);
}
BENCHMARK(sum_alone)
    ->ArgNames({"op", "path"})
    ->ArgsProduct({{0, 1, 2, 3, 4, 5}, paths()})
    ->Unit(benchmark::kMillisecond);

// Half of every row of a bf16 matrix, as a row-parallel shard reads it: rows of range(0) bytes from
// rows of twice that. Arguments: row bytes, fingerprint.
void rows(benchmark::State& state) {
  const auto row_bytes = static_cast<uint64_t>(state.range(0));
  StridedCopy copy;
  copy.op = ElementOp::kCopy2;
  copy.count[2] = static_cast<uint32_t>(row_bytes / 2);
  copy.count[1] = static_cast<uint32_t>(kPieceBytes / row_bytes);
  copy.source_stride[1] = static_cast<int64_t>(row_bytes);
  copy.index_stride[1] = static_cast<int64_t>(row_bytes);
  copy.target_stride[1] = static_cast<int64_t>(row_bytes / 2);
  copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
  copy.fingerprint = state.range(1) != 0;
  const uint64_t total = span_bytes() / 2;
  for (auto _ : state) {
    for (uint64_t at = 0; at < total; at += kPieceBytes) {
      copy.target = memory().target() + at;
      benchmark::DoNotOptimize(run_copy(copy, memory().source() + 2 * at));
    }
    copy_fence();
  }
  set_rate(state, total);
}
BENCHMARK(rows)
    ->ArgNames({"row", "fingerprint"})
    ->ArgsProduct({{128, 512, 1024, 2048, 4096, 16384, 65536}, {0, 1}})
    ->Unit(benchmark::kMillisecond);

// A square bf16 transpose of 1 MiB pieces.
void transpose(benchmark::State& state) {
  constexpr int64_t kSide = 724;  // 724 * 724 * 2 is just under 1 MiB
  StridedCopy copy;
  copy.op = ElementOp::kCopy2;
  copy.count[1] = copy.count[2] = kSide;
  copy.source_stride[1] = 1;
  copy.source_stride[2] = kSide;
  copy.target_stride[1] = kSide;
  copy.target_stride[2] = 1;
  for (auto _ : state) {
    for (uint64_t at = 0; at < span_bytes(); at += kPieceBytes) {
      copy.target = memory().target() + at;
      benchmark::DoNotOptimize(run_copy(copy, memory().source() + at));
    }
  }
  set_rate(state, span_bytes() / kPieceBytes * kSide * kSide * 2);
}
BENCHMARK(transpose)->Unit(benchmark::kMillisecond);

// The same bytes through tickets of 1 MiB and range(0) threads, 64 tickets in flight.
void queue(benchmark::State& state) {
  ReadQueue reads({.threads = static_cast<uint32_t>(state.range(0))});
  const MappedSource source(memory().source(), span_bytes());
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < span_bytes(); at += kPieceBytes) {
    copies.push_back(contiguous(ElementOp::kCopy1, kPieceBytes));
    copies.back().source_offset_bytes = at;
    copies.back().target = memory().target() + at;
  }
  std::vector<TicketId> live;
  for (auto _ : state) {
    size_t next = 0;
    while (next < copies.size() || !live.empty()) {
      while (next < copies.size() && live.size() < 64) {
        live.push_back(*reads.submit(source, {&copies[next++], 1}, {}));
      }
      reads.wait_any(live, Deadline::after_ms(60000));
      std::erase_if(live, [&](TicketId ticket) {
        return reads.poll(ticket) != TicketState::kPending && reads.finish(ticket).has_value();
      });
    }
  }
  set_rate(state, span_bytes());
}
BENCHMARK(queue)->Arg(1)->Arg(2)->UseRealTime()->Unit(benchmark::kMillisecond);

void memcpy_threads(benchmark::State& state) {
  const auto threads = static_cast<uint64_t>(state.threads());
  const auto index = static_cast<uint64_t>(state.thread_index());
  const uint64_t share = span_bytes() / threads;
  for (auto _ : state) {
    std::memcpy(memory().target() + index * share, memory().source() + index * share, share);
  }
  set_rate(state, share);
}
BENCHMARK(memcpy_threads)->ThreadRange(1, 2)->UseRealTime()->Unit(benchmark::kMillisecond);

// What one small ticket costs: submit, wait, finish.
void ticket(benchmark::State& state) {
  ReadQueue reads({.threads = 1});
  const MappedSource source(memory().source(), span_bytes());
  StridedCopy copy = contiguous(ElementOp::kCopy1, 64);
  copy.target = memory().target();
  for (auto _ : state) {
    const TicketId id = *reads.submit(source, {&copy, 1}, {});
    reads.wait_any({&id, 1}, Deadline::after_ms(60000));
    if (!reads.finish(id)) state.SkipWithError("a ticket failed");
  }
}
BENCHMARK(ticket)->UseRealTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace transfuse
