// Staged pieces together do what the copy does, whatever its strides and its cast.
#include "transport/cuda/staged_pieces.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <random>
#include <vector>

#include "copy/copy.h"
#include "copy/element_size.h"
#include "transfuse/copy.h"

namespace transfuse::cuda {
namespace {

constexpr size_t kBytes = 1 << 16;

StridedCopy random_copy(std::mt19937& random) {
  const auto up_to = [&](uint32_t n) { return 1 + random() % n; };
  StridedCopy copy;
  copy.op = static_cast<ElementOp>(random() % kElementOpCount);
  for (uint32_t& count : copy.count) count = static_cast<uint32_t>(up_to(9));
  int64_t source = static_cast<int64_t>(up_to(3));
  int64_t target = static_cast<int64_t>(up_to(3));
  int64_t index = 1;
  for (int level = 2; level >= 0; --level) {
    copy.source_stride[level] = source;
    copy.target_stride[level] = target;
    copy.index_stride[level] = index;
    source *= copy.count[level] + static_cast<int64_t>(random() % 2);
    target *= copy.count[level] + static_cast<int64_t>(random() % 2);
    index *= copy.count[level];
  }
  if (random() % 4 == 0) std::swap(copy.target_stride[1], copy.target_stride[2]);  // a transpose
  if (copy.target_stride[1] < copy.target_stride[2] && copy.count[1] > copy.target_stride[2]) {
    copy.count[1] = static_cast<uint32_t>(copy.target_stride[2]);  // elements stay apart
  }
  copy.source_offset_bytes = random() % 7;
  copy.linear_index = random();
  copy.fingerprint_key = random();
  copy.fingerprint = true;
  return copy;
}

TEST(StagedPieces, DoTogetherWhatTheCopyDoes) {
  std::mt19937 random(7);
  std::vector<std::byte> source(kBytes);
  for (std::byte& byte : source) byte = static_cast<std::byte>(random());
  for (int round = 0; round < 500; ++round) {
    StridedCopy copy = random_copy(random);
    std::vector<std::byte> expected(kBytes, std::byte{0});
    copy.target = expected.data();
    const uint64_t sum = run_copy(copy, source.data() + copy.source_offset_bytes);

    std::vector<std::byte> found(kBytes, std::byte{0});
    copy.target = found.data();
    const uint64_t most = 1 + random() % 40;
    const bool casts_first = random() % 2 == 0;
    std::vector<StridedCopy> pieces;
    cut_copy(copy, most, pieces);
    uint64_t staged_sum = 0;
    uint64_t elements = 0;
    for (const StridedCopy& piece : pieces) {
      ASSERT_LE(piece.element_count(), most);
      elements += piece.element_count();
      const uint32_t widest = std::max(source_bytes_of(copy.op), target_bytes_of(copy.op));
      const uint64_t offset = random() % 3;
      std::vector<std::byte> buffer(offset + most * widest);
      const StagedPiece staged = stage_piece(piece, buffer.data(), offset, casts_first);
      staged_sum += run_copy(staged.to_stage, source.data() + staged.to_stage.source_offset_bytes);
      staged_sum +=
          run_copy(staged.from_stage, buffer.data() + staged.from_stage.source_offset_bytes);
    }
    copy_fence();
    EXPECT_EQ(elements, copy.element_count());
    EXPECT_EQ(staged_sum, sum) << "round " << round;
    EXPECT_EQ(found, expected) << "round " << round;
  }
}

// Bytes of numbers as weights have them, in every dtype; as scales, too.
std::vector<std::byte> some_numbers(std::mt19937& random, size_t count) {
  std::vector<std::byte> bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>((random() & 0x83) | 0x3C);
  return bytes;
}

TEST(StagedPieces, OfCopiesWithScalesTooWhereverTheScalesLie) {
  std::mt19937 random(9);
  const std::vector<std::byte> source = some_numbers(random, 60000);
  const std::vector<std::byte> apart = some_numbers(random, 60000);
  for (int round = 0; round < 600; ++round) {
    SCOPED_TRACE(round);
    StridedCopy copy;
    BlockScales scales;
    copy.op = static_cast<ElementOp>(kElementOpCount + static_cast<int>(random() % kScaledOpCount));
    copy.fingerprint = true;
    copy.fingerprint_key = random();
    scales.fingerprint_key = random();
    copy.source_offset_bytes = random() % 9;
    for (int axis = 0; axis < 2; ++axis) {
      copy.count[axis + 1] = static_cast<uint32_t>(1 + random() % 60);
      scales.block[axis] = static_cast<uint32_t>(1 + random() % 20);
      if (!quantizes(copy.op))
        scales.phase[axis] = static_cast<uint32_t>(random() % scales.block[axis]);
    }
    const auto columns = static_cast<int64_t>(copy.count[2]);
    copy.source_stride[1] = columns + static_cast<int64_t>(random() % 3);
    copy.target_stride[1] = columns + static_cast<int64_t>(random() % 3);
    copy.index_stride[1] = columns;
    copy.source_stride[2] = copy.target_stride[2] = copy.index_stride[2] = 1;
    copy.scales = &scales;
    scales.stride[0] = static_cast<int64_t>(copy.block_count(1)) + 2;
    scales.stride[1] = scales.index_stride[1] = 1;
    scales.index_stride[0] = 77;
    scales.source_offset_bytes = 4 * (random() % 50);

    std::vector<std::byte> expected(60000);
    std::vector<std::byte> expected_scales(60000);
    StridedCopy whole = copy;
    BlockScales fetched = scales;
    whole.target = expected.data();
    whole.scales = &fetched;
    fetched.target = expected_scales.data();
    fetched.fetched = apart.data() + scales.source_offset_bytes;
    const uint64_t sum = run_copy(whole, source.data() + copy.source_offset_bytes);

    std::vector<std::byte> found(60000);
    std::vector<std::byte> found_scales(60000);
    copy.target = found.data();
    scales.target = found_scales.data();
    const bool casts_first = random() % 2 == 0;
    std::vector<StridedCopy> pieces;
    std::deque<BlockScales> piece_scales;
    cut_scaled_copy(copy, 1 + random() % 900, pieces, piece_scales);
    uint64_t staged_sum = 0;
    for (const StridedCopy& piece : pieces) {
      const uint64_t offset = 16 * (random() % 3);
      std::vector<std::byte> buffer(offset + staged_bytes(piece, casts_first));
      StagedPiece staged = stage_piece(piece, buffer.data(), offset, casts_first);
      // Neither side sees the other's memory: what is read of scales is the host's or the buffer's.
      StridedCopy& scaled = casts_first ? staged.to_stage : staged.from_stage;
      ASSERT_TRUE(is_scaled(scaled.op));
      scaled.scales = &staged.blocks;
      if (casts_first && !quantizes(copy.op)) {
        staged.blocks.fetched = apart.data() + staged.blocks.source_offset_bytes;
      }
      const auto move_scales = [&](const std::byte* from) {
        if (staged.scales.element_count() == 0) return;
        run_copy(staged.scales, from + staged.scales.source_offset_bytes);
      };
      if (!casts_first) move_scales(apart.data());
      staged_sum += run_copy(staged.to_stage, source.data() + staged.to_stage.source_offset_bytes);
      staged_sum +=
          run_copy(staged.from_stage, buffer.data() + staged.from_stage.source_offset_bytes);
      if (casts_first) move_scales(buffer.data());
    }
    copy_fence();
    EXPECT_EQ(staged_sum, sum);
    ASSERT_TRUE(found == expected);
    ASSERT_TRUE(found_scales == expected_scales);
  }
}

TEST(StagedPieces, OfNothingAreNone) {
  StridedCopy copy;
  copy.count[1] = 0;
  std::vector<StridedCopy> pieces;
  cut_copy(copy, 10, pieces);
  EXPECT_TRUE(pieces.empty());
}

}  // namespace
}  // namespace transfuse::cuda
