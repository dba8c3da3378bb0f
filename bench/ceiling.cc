// The threads and their shares.
#include "ceiling.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "bench/weights.h"
#include "stopwatch.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse::bench {

Result<Ceiling> Ceiling::open(uint64_t size_bytes, uint32_t threads) {
  LayoutBuilder builder;
  const auto count = static_cast<int64_t>(size_bytes);
  const uint32_t tensor = builder.tensor({"bytes", Dtype::kU8, {count}});
  builder.tile(tensor, Box::whole({count}), builder.parameter({"bytes", Dtype::kU8, count}), 0);
  TRANSFUSE_ASSIGN_OR_RETURN(const Layout layout, builder.build());
  TRANSFUSE_ASSIGN_OR_RETURN(Weights source, Weights::allocate(layout, nullptr));
  return Ceiling(std::move(source), std::max(threads, 1u));
}

double Ceiling::copy_seconds(std::span<std::byte> target, uint32_t threads) const {
  const uint64_t size = std::min<uint64_t>(target.size(), source_.size_bytes());
  const uint64_t share = (size + threads - 1) / threads;
  const Stopwatch watch;
  std::vector<std::thread> workers;
  const auto copy = [&](uint64_t begin) {
    const uint64_t end = std::min(begin + share, size);
    if (begin < end)
      std::memcpy(target.data() + begin, source_.bytes().data() + begin, end - begin);
  };
  for (uint32_t i = 1; i < threads; ++i) workers.emplace_back(copy, i * share);
  copy(0);
  for (std::thread& worker : workers) worker.join();
  return watch.seconds();
}

}  // namespace transfuse::bench
