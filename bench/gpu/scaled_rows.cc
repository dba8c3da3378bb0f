// Every matrix is one copy with scales of 128x128 blocks; all of them are one launch.
#include "scaled_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gpu_stopwatch.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/cuda/copy_engine.h"
#include "transport/cuda/device.h"
#include "transport/cuda/driver.h"

namespace transfuse::bench {
namespace {

using cuda::CopyOptions;
using cuda::Device;
using cuda::Memory;
using cuda::MemoryKind;
using cuda::PreparedCopies;

constexpr uint32_t kBlock = 128;

struct Shape {
  uint32_t rows;
  uint32_t columns;
};
// q, k, v, o, gate, up and down of a layer.
constexpr std::array<Shape, 7> kLayer = {{{4096, 2560},
                                          {1024, 2560},
                                          {1024, 2560},
                                          {2560, 4096},
                                          {9728, 2560},
                                          {9728, 2560},
                                          {2560, 9728}}};

struct Row {
  const char* name;
  ElementOp op;
};
constexpr std::array<Row, 4> kRows = {
    {{"fp8: bf16 -> fp8 with block scales", ElementOp::kBF16ToE4M3},
     {"fp8: f32 -> fp8 with block scales", ElementOp::kF32ToE4M3},
     {"fp8: fp8 with block scales -> bf16", ElementOp::kE4M3ToBF16},
     {"fp8: fp8 with block scales -> f32", ElementOp::kE4M3ToF32}}};

// Matrices one after another on both sides, then the scales of all of them on the side of fp8.
struct Matrices {
  std::vector<StridedCopy> copies;
  std::vector<BlockScales> scales;
  uint64_t source_bytes = 0;
  uint64_t target_bytes = 0;
};

Matrices matrices_of(ElementOp op, int layers) {
  Matrices all;
  uint64_t elements = 0;
  uint64_t scale_count = 0;
  for (int layer = 0; layer < layers; ++layer) {
    for (const Shape& shape : kLayer) {
      StridedCopy copy;
      copy.op = op;
      copy.fingerprint_key = 0x5EED + all.copies.size();
      copy.count[1] = shape.rows;
      copy.count[2] = shape.columns;
      for (auto* stride : {copy.source_stride, copy.target_stride, copy.index_stride}) {
        stride[1] = shape.columns;
        stride[2] = 1;
      }
      copy.source_offset_bytes = elements * source_element_bytes(op);
      copy.target = reinterpret_cast<std::byte*>(elements * target_element_bytes(op));
      BlockScales scales{.target = reinterpret_cast<std::byte*>(scale_count * 4),
                         .source_offset_bytes = scale_count * 4,
                         .fingerprint_key = 0x5CA1E + all.copies.size()};
      scales.stride[0] = scales.index_stride[0] = shape.columns / kBlock;
      scales.stride[1] = scales.index_stride[1] = 1;
      elements += uint64_t{shape.rows} * shape.columns;
      scale_count += uint64_t{shape.rows / kBlock} * (shape.columns / kBlock);
      all.copies.push_back(copy);
      all.scales.push_back(scales);
    }
  }
  all.source_bytes = elements * source_element_bytes(op);
  all.target_bytes = elements * target_element_bytes(op);
  const uint64_t numbers = quantizes(op) ? all.target_bytes : all.source_bytes;
  for (BlockScales& scales : all.scales) {
    if (quantizes(op)) scales.target += numbers;
    if (!quantizes(op)) scales.source_offset_bytes += numbers;
  }
  (quantizes(op) ? all.target_bytes : all.source_bytes) += scale_count * 4;
  return all;
}

class ScaledBench {
 public:
  ScaledBench(const GpuStopwatch& watch, const Memory& from, const Memory& into)
      : watch_(watch), from_(from), into_(into) {}

  Result<nlohmann::json> measure(const Row& row, const Matrices& all, bool fingerprint,
                                 double ceiling) const {
    std::vector<StridedCopy> copies = all.copies;
    std::vector<BlockScales> scales = all.scales;
    for (size_t i = 0; i < copies.size(); ++i) {
      copies[i].target += into_.address();
      scales[i].target += into_.address();
      copies[i].scales = &scales[i];
      copies[i].fingerprint = fingerprint;
    }
    TRANSFUSE_ASSIGN_OR_RETURN(PreparedCopies prepared, prepare(copies));
    const std::array<CUdeviceptr, 1> bases = {from_.address()};
    TRANSFUSE_ASSIGN_OR_RETURN(const double ms, watch_.median_ms([&] {
      return prepared.launch(bases, {.stream = watch_.stream()});
    }));
    const double rate = static_cast<double>(all.source_bytes) / ms / 1e6;
    const double moved = static_cast<double>(all.source_bytes + all.target_bytes) / ms / 1e6;
    nlohmann::json out = {
        {"ms", ms}, {"read_gb_s", rate}, {"moved_gb_s", moved}, {"ratio", rate / ceiling}};
    if (fingerprint) {
      TRANSFUSE_ASSIGN_OR_RETURN(const auto held, sums_at_target(row.op, copies, scales));
      out["verified"] = std::ranges::equal(prepared.sums(), held);
    }
    return out;
  }

 private:
  Result<PreparedCopies> prepare(std::span<const StridedCopy> copies) const {
    const std::vector<uint32_t> sources(copies.size(), 0);
    return PreparedCopies::make(watch_.device(), copies, sources, 1, CopyOptions{});
  }

  // Of the elements as they lie there, and of the scales.
  Result<std::vector<uint64_t>> sums_at_target(ElementOp op, std::span<const StridedCopy> copies,
                                               std::span<const BlockScales> scales) const {
    std::vector<StridedCopy> sums;
    for (size_t i = 0; i < copies.size(); ++i) {
      StridedCopy elements = copies[i];
      const uint32_t bytes = target_element_bytes(op);
      elements.op = bytes == 1   ? ElementOp::kCopy1
                    : bytes == 2 ? ElementOp::kCopy2
                                 : ElementOp::kCopy4;
      elements.source_offset_bytes = reinterpret_cast<uint64_t>(elements.target);
      elements.target = nullptr;
      elements.scales = nullptr;
      sums.push_back(elements);
      if (!quantizes(op)) continue;
      StridedCopy of_scales;
      of_scales.op = ElementOp::kCopy4;
      of_scales.fingerprint = true;
      of_scales.fingerprint_key = scales[i].fingerprint_key;
      of_scales.source_offset_bytes = reinterpret_cast<uint64_t>(scales[i].target);
      of_scales.count[2] =
          static_cast<uint32_t>(copies[i].block_count(0) * copies[i].block_count(1));
      of_scales.source_stride[2] = of_scales.index_stride[2] = 1;
      sums.push_back(of_scales);
    }
    TRANSFUSE_ASSIGN_OR_RETURN(PreparedCopies prepared, prepare(sums));
    const std::array<CUdeviceptr, 1> bases = {0};
    TRANSFUSE_RETURN_IF_ERROR(prepared.launch(bases, {.stream = watch_.stream()}));
    TRANSFUSE_RETURN_IF_ERROR(watch_.wait());
    std::vector<uint64_t> found(copies.size());
    const size_t each = sums.size() / copies.size();
    for (size_t i = 0; i < sums.size(); ++i) found[i / each] += prepared.sums()[i];
    return found;
  }

  const GpuStopwatch& watch_;
  const Memory& from_;
  const Memory& into_;
};

// Numbers as weights have them in every dtype: no NaN, and none so large or so small that its block
// is a rare one.
Result<void> fill_with_weights(const Device& device, const Memory& memory) {
  std::vector<std::byte> block(uint64_t{8} << 20);
  uint64_t state = 88172645463325252U;
  for (std::byte& byte : block) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    byte = static_cast<std::byte>(((state >> 32) & 0x83) | 0x3C);
  }
  TRANSFUSE_ASSIGN_OR_RETURN(const cuda::Stream stream, cuda::Stream::create(device));
  const cuda::Current current = device.use();
  for (uint64_t at = 0; at < memory.size_bytes(); at += block.size()) {
    const uint64_t size = std::min<uint64_t>(block.size(), memory.size_bytes() - at);
    TRANSFUSE_RETURN_IF_ERROR(TRANSFUSE_CUDA(device.driver(), cuMemcpyAsync, memory.address() + at,
                                             reinterpret_cast<CUdeviceptr>(block.data()), size,
                                             stream.get()));
  }
  return TRANSFUSE_CUDA(device.driver(), cuStreamSynchronize, stream.get());
}

}  // namespace

Result<nlohmann::json> measure_scaled(const Device& source, const Device& target,
                                      const GpuOptions& options) {
  nlohmann::json rows = nlohmann::json::array();
  TRANSFUSE_ASSIGN_OR_RETURN(const GpuStopwatch watch, GpuStopwatch::create(target));
  for (const Row& row : kRows) {
    if (std::string_view(row.name).find(options.only) == std::string_view::npos) continue;
    const Matrices all = matrices_of(row.op, options.small ? 4 : 36);
    TRANSFUSE_ASSIGN_OR_RETURN(const Memory from,
                               Memory::allocate(source, MemoryKind::kDevice, all.source_bytes));
    // As large as what is read, so that a plain copy of it fits.
    const uint64_t room = std::max(all.source_bytes, all.target_bytes);
    TRANSFUSE_ASSIGN_OR_RETURN(const Memory into,
                               Memory::allocate(target, MemoryKind::kDevice, room));
    TRANSFUSE_RETURN_IF_ERROR(fill_with_weights(source, from));
    TRANSFUSE_ASSIGN_OR_RETURN(const double ceiling,
                               watch.one_piece(into.address(), from.address(), all.source_bytes));
    const ScaledBench bench(watch, from, into);
    nlohmann::json out = {{"scaled", row.name},
                          {"bytes_read", all.source_bytes},
                          {"bytes_written", all.target_bytes},
                          {"copy_engine_one_piece_gb_s", ceiling}};
    for (const bool fingerprint : {false, true}) {
      const char* const mode = fingerprint ? "kernel, fingerprints" : "kernel";
      TRANSFUSE_ASSIGN_OR_RETURN(nlohmann::json found,
                                 bench.measure(row, all, fingerprint, ceiling));
      fmt::print(
          options.table,
          "{:40} {:22} {:8.2f} ms, read {:7.1f} GB/s, {:.3f} of a plain copy ({:.0f}), {:7.1f} "
          "read and written{}\n",
          row.name, mode, found["ms"].get<double>(), found["read_gb_s"].get<double>(),
          found["ratio"].get<double>(), ceiling, found["moved_gb_s"].get<double>(),
          found.value("verified", true) ? "" : "  WRONG");
      (void)std::fflush(options.table);
      out[mode] = std::move(found);
    }
    rows.push_back(std::move(out));
  }
  return rows;
}

}  // namespace transfuse::bench
