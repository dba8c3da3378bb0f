// Host to GPU and back, as the transport stages it.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "measure_gpu.h"
#include "transfuse/copy.h"
#include "transfuse/deadline.h"
#include "transfuse/gpu.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse::bench {
namespace {

constexpr uint64_t kPieceBytes = uint64_t{16} << 20;
constexpr int kTimes = 5;

Result<double> timed_ms(Transport& transport, const RemoteRegion& region,
                        std::span<const StridedCopy> copies) {
  std::vector<uint64_t> sums(copies.size());
  const auto start = std::chrono::steady_clock::now();
  TRANSFUSE_ASSIGN_OR_RETURN(
      const TicketId ticket,
      transport.submit({.region = &region, .copies = copies, .fingerprints = sums}));
  while (!transport.wait_any({&ticket, 1}, Deadline::after_ms(1000))) continue;
  TRANSFUSE_RETURN_IF_ERROR(transport.finish(ticket));
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

// The median of several after one that warms up.
Result<double> median_ms(Transport& transport, const RemoteRegion& region,
                         std::span<const StridedCopy> copies) {
  std::array<double, kTimes> times{};
  TRANSFUSE_RETURN_IF_ERROR(timed_ms(transport, region, copies));
  for (double& time : times) {
    TRANSFUSE_ASSIGN_OR_RETURN(time, timed_ms(transport, region, copies));
  }
  std::ranges::sort(times);
  return times[kTimes / 2];
}

std::vector<StridedCopy> pieces(std::span<std::byte> target, bool fingerprint) {
  std::vector<StridedCopy> copies;
  for (uint64_t at = 0; at < target.size(); at += kPieceBytes) {
    copies.push_back({.source_offset_bytes = at,
                      .target = target.data() + at,
                      .linear_index = at / 2,
                      .count = {1, 1, static_cast<uint32_t>(kPieceBytes / 2)},
                      .op = ElementOp::kCopy2,
                      .fingerprint = fingerprint,
                      .source_stride = {0, 0, 1},
                      .target_stride = {0, 0, 1},
                      .index_stride = {0, 0, 1}});
  }
  return copies;
}

}  // namespace

Result<nlohmann::json> measure_staged(const GpuOptions& options) {
  const uint64_t bytes = options.small ? uint64_t{64} << 20 : uint64_t{1} << 30;
  nlohmann::json rows = nlohmann::json::array();
  const std::array<std::string, 2> names = {"host to GPU", "GPU to host"};
  if (std::ranges::none_of(names, [&](const std::string& name) {
        return name.find(options.only) != std::string::npos;
      })) {
    return rows;
  }
  TRANSFUSE_ASSIGN_OR_RETURN(auto host, open_local_transport());
  TRANSFUSE_ASSIGN_OR_RETURN(const auto transport,
                             open_cuda_transport(std::move(host), options.device));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto in_host, transport->allocate(bytes));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto on_device, transport->allocate_on_device(bytes));
  std::ranges::fill(in_host->bytes(), std::byte{7});
  TRANSFUSE_ASSIGN_OR_RETURN(const RemoteRegion* own, transport->own_memory());
  TRANSFUSE_ASSIGN_OR_RETURN(const std::string endpoint, transport->endpoint());
  TRANSFUSE_ASSIGN_OR_RETURN(const auto self,
                             transport->connect(endpoint, "", Deadline::after_ms(10000)));
  TRANSFUSE_ASSIGN_OR_RETURN(const auto region,
                             self->open_region(in_host->descriptor(), Deadline::after_ms(10000)));
  for (const bool up : {true, false}) {
    const std::string& name = names[up ? 0 : 1];
    if (name.find(options.only) == std::string::npos) continue;
    nlohmann::json row = {{"staged", name}, {"bytes", bytes}, {"gpus", 1}};
    for (const bool fingerprint : {false, true}) {
      auto copies = pieces(up ? on_device->bytes() : in_host->bytes(), fingerprint);
      if (!up) {  // of all the process' own memory
        for (StridedCopy& copy : copies) {
          copy.source_offset_bytes += reinterpret_cast<uint64_t>(on_device->bytes().data());
        }
      }
      TRANSFUSE_ASSIGN_OR_RETURN(const double ms,
                                 median_ms(*transport, up ? *region : *own, copies));
      const double rate = static_cast<double>(bytes) / ms / 1e6;
      const char* const mode = fingerprint ? "fingerprints" : "plain";
      fmt::print(options.table, "{:34} {:24} {:8.2f} ms {:7.1f} GB/s\n", name, mode, ms, rate);
      (void)std::fflush(options.table);
      row[mode] = {{"ms", ms}, {"gb_s", rate}};
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace transfuse::bench
