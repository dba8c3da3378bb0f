// Requests that differ anywhere have different keys.
#include "transport/cuda/copy_key.h"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "transfuse/copy.h"

namespace transfuse::cuda {
namespace {

std::vector<StridedCopy> some_copies() {
  std::vector<StridedCopy> copies(70);
  for (size_t i = 0; i < copies.size(); ++i) {
    copies[i].source_offset_bytes = i * 64;
    copies[i].target = reinterpret_cast<std::byte*>(4096 + i * 64);
    copies[i].count[2] = 64;
    copies[i].source_stride[2] = copies[i].target_stride[2] = 1;
  }
  return copies;
}

TEST(CopyKey, IsTheSameForTheSameCopies) {
  const std::vector<uint32_t> sources(70, 0);
  EXPECT_EQ(key_of(some_copies(), sources, sources, true),
            key_of(some_copies(), sources, sources, true));
}

TEST(CopyKey, DiffersWhereAnythingDiffers) {
  const std::vector<uint32_t> sources(70, 0);
  const CopyKey key = key_of(some_copies(), sources, sources, true);
  const std::vector<std::function<void(StridedCopy&)>> changes = {
      [](StridedCopy& c) { ++c.source_offset_bytes; },
      [](StridedCopy& c) { ++c.target; },
      [](StridedCopy& c) { ++c.linear_index; },
      [](StridedCopy& c) { ++c.fingerprint_key; },
      [](StridedCopy& c) { c.op = ElementOp::kCopy2; },
      [](StridedCopy& c) { c.fingerprint = true; },
      [](StridedCopy& c) { ++c.count[0]; },
      [](StridedCopy& c) { ++c.count[1]; },
      [](StridedCopy& c) { ++c.count[2]; },
      [](StridedCopy& c) { ++c.source_stride[0]; },
      [](StridedCopy& c) { ++c.source_stride[2]; },
      [](StridedCopy& c) { ++c.target_stride[1]; },
      [](StridedCopy& c) { ++c.index_stride[2]; },
  };
  for (size_t at : {size_t{0}, size_t{31}, size_t{32}, size_t{69}}) {
    for (size_t i = 0; i < changes.size(); ++i) {
      auto copies = some_copies();
      changes[i](copies[at]);
      EXPECT_NE(key_of(copies, sources, sources, true), key) << "copy " << at << ", change " << i;
    }
    auto other = sources;
    other[at] = 1;
    EXPECT_NE(key_of(some_copies(), other, sources, true), key);
  }
  EXPECT_NE(key_of(some_copies(), sources, sources, false), key);
  auto fewer = some_copies();
  fewer.pop_back();
  const std::vector<uint32_t> fewer_sources(69, 0);
  EXPECT_NE(key_of(fewer, fewer_sources, fewer_sources, true), key);
}

TEST(CopyKey, DiffersWhereScalesAreReadElsewhere) {
  const std::vector<uint32_t> sources(70, 0);
  auto copies = some_copies();
  BlockScales scales;
  for (StridedCopy& copy : copies) copy.op = ElementOp::kE4M3ToBF16;
  for (StridedCopy& copy : copies) copy.scales = &scales;
  const CopyKey key = key_of(copies, sources, sources, true);
  auto other = sources;
  other[33] = 1;
  EXPECT_NE(key_of(copies, sources, other, true), key);
  ++scales.source_offset_bytes;
  EXPECT_NE(key_of(copies, sources, sources, true), key);
}

}  // namespace
}  // namespace transfuse::cuda
