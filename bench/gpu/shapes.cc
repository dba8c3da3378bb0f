// Misaligned, transposed, filled and cast matrices; launches under a limit.
#include "shapes.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gpu_stopwatch.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"

namespace transfuse::bench {
namespace {

using cuda::CopyOptions;
using cuda::Device;
using cuda::Memory;
using cuda::MemoryKind;
using cuda::PreparedCopies;

constexpr uint64_t kColumns = 8192;
constexpr uint64_t kKey = 0x5EED;

struct Shape {
  std::string name;
  StridedCopy copy;
  PreparedCopies::Launch limits{};
};

StridedCopy matrix(ElementOp op, uint64_t bytes) {
  const uint64_t rows = bytes / kColumns / source_element_bytes(op);
  constexpr auto kPitch = static_cast<int64_t>(kColumns);
  return {.fingerprint_key = kKey,
          .count = {1, static_cast<uint32_t>(rows), static_cast<uint32_t>(kColumns)},
          .op = op,
          .source_stride = {0, kPitch, 1},
          .target_stride = {0, kPitch, 1},
          .index_stride = {0, kPitch, 1}};
}

StridedCopy shifted(ElementOp op, uint64_t bytes, uint64_t offset) {
  StridedCopy copy = matrix(op, bytes);
  copy.source_offset_bytes = offset;
  return copy;
}

StridedCopy transposed(ElementOp op, uint64_t bytes) {
  StridedCopy copy = matrix(op, bytes);
  copy.source_stride[1] = 1;
  copy.source_stride[2] = copy.count[1];
  return copy;
}

StridedCopy fill(uint64_t bytes) {
  StridedCopy copy = matrix(ElementOp::kCopy2, bytes);
  std::fill_n(copy.source_stride, 3, 0);
  return copy;
}

std::vector<Shape> shapes_of(uint64_t bytes) {
  std::vector<Shape> shapes = {
      {"aligned, 2-byte elements", matrix(ElementOp::kCopy2, bytes)},
      {"misaligned by 1 byte, 2-byte elements", shifted(ElementOp::kCopy2, bytes, 1)},
      {"misaligned by 2 bytes, 2-byte elements", shifted(ElementOp::kCopy2, bytes, 2)},
      {"misaligned by 1 byte, 1-byte elements", shifted(ElementOp::kCopy1, bytes, 1)},
      {"aligned, 1-byte elements", matrix(ElementOp::kCopy1, bytes)},
      {"transposed, 1-byte elements", transposed(ElementOp::kCopy1, bytes)},
      {"transposed, 2-byte elements", transposed(ElementOp::kCopy2, bytes)},
      {"transposed, 4-byte elements", transposed(ElementOp::kCopy4, bytes)},
      {"transposed, f32 to bf16", transposed(ElementOp::kF32ToBF16, bytes)},
      {"fill", fill(bytes)},
      {"f32 to bf16", matrix(ElementOp::kF32ToBF16, bytes)},
      {"bf16 to f32", matrix(ElementOp::kBF16ToF32, bytes / 2)}};
  for (const uint32_t count : {8U, 16U, 32U, 66U}) {
    shapes.push_back({fmt::format("limited to {} multiprocessors", count),
                      matrix(ElementOp::kCopy2, bytes),
                      {.multiprocessors = count}});
  }
  for (const double rate : {50.0, 200.0}) {
    shapes.push_back({fmt::format("paced at {} GB/s", rate),
                      matrix(ElementOp::kCopy2, bytes),
                      {.gigabytes_per_second = rate}});
  }
  return shapes;
}

class ShapeBench {
 public:
  ShapeBench(GpuStopwatch& watch, const Memory& from, const Memory& into)
      : watch_(watch), from_(from), into_(into) {}

  Result<nlohmann::json> measure(const Shape& shape, bool fingerprint, double ceiling) const {
    std::array<StridedCopy, 1> copies = {shape.copy};
    copies[0].target = reinterpret_cast<std::byte*>(into_.address());
    copies[0].fingerprint = true;
    TRANSFUSE_ASSIGN_OR_RETURN(PreparedCopies summing, prepare(copies));
    const std::array<CUdeviceptr, 1> bases = {from_.address()};
    TRANSFUSE_RETURN_IF_ERROR(summing.launch(bases, {.stream = watch_.stream()}));
    TRANSFUSE_RETURN_IF_ERROR(watch_.wait());
    const uint64_t expected = summing.sums()[0];

    copies[0].fingerprint = fingerprint;
    TRANSFUSE_ASSIGN_OR_RETURN(PreparedCopies prepared, prepare(copies));
    TRANSFUSE_RETURN_IF_ERROR(watch_.clear(into_));
    PreparedCopies::Launch launch = shape.limits;
    launch.stream = watch_.stream();
    TRANSFUSE_ASSIGN_OR_RETURN(const double ms,
                               watch_.median_ms([&] { return prepared.launch(bases, launch); }));
    TRANSFUSE_ASSIGN_OR_RETURN(const auto held, watch_.sums_at_target(copies, into_));
    const auto bytes =
        static_cast<double>(std::max(prepared.target_bytes(), prepared.source_bytes()));
    const double rate = bytes / ms / 1e6;
    return nlohmann::json{
        {"ms", ms}, {"gb_s", rate}, {"ratio", rate / ceiling}, {"verified", held[0] == expected}};
  }

 private:
  Result<PreparedCopies> prepare(const std::array<StridedCopy, 1>& copies) const {
    CopyOptions options;
    if (!copies[0].fingerprint) options.table.item_bytes = uint64_t{64} << 10;
    const std::array<uint32_t, 1> sources = {0};
    return PreparedCopies::make(watch_.device(), copies, sources, 1, options);
  }

  GpuStopwatch& watch_;
  const Memory& from_;
  const Memory& into_;
};

}  // namespace

Result<nlohmann::json> measure_shapes(const Device& source, const Device& target,
                                      const GpuOptions& options) {
  const uint64_t bytes = options.small ? uint64_t{64} << 20 : uint64_t{2} << 30;
  nlohmann::json rows = nlohmann::json::array();
  std::vector<Shape> shapes = shapes_of(bytes);
  std::erase_if(shapes,
                [&](const Shape& s) { return s.name.find(options.only) == std::string::npos; });
  if (shapes.empty()) return rows;
  TRANSFUSE_ASSIGN_OR_RETURN(GpuStopwatch watch, GpuStopwatch::create(target));
  TRANSFUSE_ASSIGN_OR_RETURN(const Memory from,
                             Memory::allocate(source, MemoryKind::kDevice, bytes + 256));
  TRANSFUSE_ASSIGN_OR_RETURN(const Memory into,
                             Memory::allocate(target, MemoryKind::kDevice, bytes));
  TRANSFUSE_RETURN_IF_ERROR(watch.scramble(from));
  TRANSFUSE_ASSIGN_OR_RETURN(const double ceiling,
                             watch.one_piece(into.address(), from.address(), bytes));
  const ShapeBench bench(watch, from, into);
  for (const Shape& shape : shapes) {
    nlohmann::json row = {
        {"shape", shape.name}, {"bytes", bytes}, {"copy_engine_one_piece_gb_s", ceiling}};
    for (const bool fingerprint : {false, true}) {
      if (fingerprint && shape.limits.limited()) continue;
      const char* const mode = fingerprint ? "kernel, fingerprints" : "kernel";
      TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json found, bench.measure(shape, fingerprint, ceiling));
      fmt::print(options.table,
                 "{:40} {:22} {:8.2f} ms {:7.1f} GB/s  {:.3f} of the copy engine ({:.0f}){}\n",
                 shape.name, mode, found["ms"].get<double>(), found["gb_s"].get<double>(),
                 found["ratio"].get<double>(), ceiling,
                 found["verified"].get<bool>() ? "" : "  WRONG");
      (void)std::fflush(options.table);
      row[mode] = std::move(found);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace transfuse::bench
