// Plans into and out of fp8 with block scales: random worlds against whole matrices worked on one
// element at a time, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/random.h"
#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "plan/copies.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/plan.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using ::testing::HasSubstr;

struct Matrix {
  std::string name;
  Dims shape;
  Dims block;

  Dims scales_shape() const {
    return {(shape[0] + block[0] - 1) / block[0], (shape[1] + block[1] - 1) / block[1]};
  }
};

// One shard of a layout under construction: where boxes of tensors go.
class Shard {
 public:
  explicit Shard(Random& random) : random_(random) {}

  // Adds `box` of `matrix` in `dtype`, at a random place of a parameter of its own, perhaps
  // transposed.
  void numbers(const Matrix& matrix, const Box& box, Dtype dtype) {
    const auto tensor = builder_.tensor({matrix.name, Dtype::kBF16, matrix.shape});
    add(tensor, box, matrix.name + std::to_string(count_++), dtype);
  }
  void scales(const Matrix& matrix, const Box& box) {
    const auto tensor =
        builder_.tensor({matrix.name + "_scale_inv", Dtype::kF32, matrix.scales_shape()});
    add(tensor, box, matrix.name + "_scale_inv" + std::to_string(count_++), Dtype::kF32);
  }
  void quantization(const Matrix& matrix) {
    const auto tensor = builder_.tensor({matrix.name, Dtype::kBF16, matrix.shape});
    const auto scales =
        builder_.tensor({matrix.name + "_scale_inv", Dtype::kF32, matrix.scales_shape()});
    builder_.quantization(tensor, scales, matrix.block[0], matrix.block[1]);
  }
  Layout build() { return builder_.build().value(); }

 private:
  void add(uint32_t tensor, const Box& box, const std::string& parameter, Dtype dtype) {
    Dims strides = row_major_strides(box.length);
    if (random_.chance(0.2)) strides = {1, box.length[0]};
    const auto handle = builder_.parameter({parameter, dtype, box.element_count()});
    builder_.tile(tensor, box, handle, 0, strides);
  }

  Random& random_;
  LayoutBuilder builder_;
  int count_ = 0;
};

std::vector<int64_t> random_cuts(Random& random, int64_t length, int64_t unit, uint64_t most) {
  std::set<int64_t> cuts = {0, length};
  for (uint64_t i = random.below(most + 1); i > 0; --i) {
    const auto at =
        static_cast<int64_t>(random.below(static_cast<uint64_t>(length / unit) + 1)) * unit;
    cuts.insert(std::min(at, length));
  }
  return {cuts.begin(), cuts.end()};
}

// Boxes that together are the matrix; cut at multiples of `unit`.
std::vector<Box> random_boxes(Random& random, const Dims& shape, const Dims& unit, uint64_t most) {
  std::vector<Box> boxes;
  const auto rows = random_cuts(random, shape[0], unit[0], most);
  const auto columns = random_cuts(random, shape[1], unit[1], most);
  for (size_t i = 0; i + 1 < rows.size(); ++i) {
    for (size_t j = 0; j + 1 < columns.size(); ++j) {
      boxes.push_back(
          {{rows[i], columns[j]}, {rows[i + 1] - rows[i], columns[j + 1] - columns[j]}});
    }
  }
  return boxes;
}

Box scales_box(const Matrix& matrix, const Box& box) {
  Box scales;
  for (int d = 0; d < 2; ++d) {
    const int64_t low = box.offset[d] / matrix.block[d];
    const int64_t end = box.offset[d] + box.length[d];
    scales.offset.push_back(low);
    scales.length.push_back((end + matrix.block[d] - 1) / matrix.block[d] - low);
  }
  return scales;
}

// The value of every element of a matrix, exact in bf16 and f16.
float value_of(const std::string& name, int64_t linear) {
  Random random(fingerprint_key(name) + static_cast<uint64_t>(linear));
  const uint64_t draw = random.next();
  if (draw % 50 == 0) return 0;
  return std::ldexp(static_cast<float>(static_cast<int64_t>(draw % 255) - 127),
                    static_cast<int>(draw >> 20 & 7) - 9);
}

uint64_t bits_of(float value, Dtype dtype) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (dtype == Dtype::kF32) return bits;
  return dtype == Dtype::kBF16 ? f32_bits_to_bf16(bits) : f32_bits_to_f16(bits);
}

// What fp8 and scales a whole matrix has, from the slow model.
struct WholeMatrix {
  std::vector<std::byte> numbers;
  std::vector<std::byte> scales;
};
WholeMatrix quantized(const Matrix& matrix) {
  std::vector<float> values;
  for (int64_t i = 0; i < matrix.shape.product(); ++i) values.push_back(value_of(matrix.name, i));
  WholeMatrix whole{
      .numbers = std::vector<std::byte>(values.size()),
      .scales = std::vector<std::byte>(static_cast<size_t>(matrix.scales_shape().product()) * 4)};
  const BlockScales scales{
      .block = {static_cast<uint32_t>(matrix.block[0]), static_cast<uint32_t>(matrix.block[1])},
      .stride = {matrix.scales_shape()[1], 1}};
  StridedCopy copy;
  copy.op = ElementOp::kF32ToE4M3;
  copy.scales = &scales;
  for (int d = 0; d < 2; ++d) {
    copy.count[d + 1] = static_cast<uint32_t>(matrix.shape[d]);
    copy.source_stride[d + 1] = copy.target_stride[d + 1] = d == 0 ? matrix.shape[1] : 1;
  }
  slow_scaled_copy(copy, reinterpret_cast<const std::byte*>(values.data()), whole.numbers.data(),
                   whole.scales.data());
  return whole;
}

// The parameters of one layout as bytes.
class Memory {
 public:
  explicit Memory(const Layout& layout) : layout_(layout) {
    for (const ParameterSpec& p : layout.parameters()) {
      bytes_.emplace_back(static_cast<size_t>(p.element_count) * dtype_size_bytes(p.dtype),
                          std::byte{0xEE});
    }
  }
  std::byte* data(uint32_t parameter) { return bytes_[parameter].data(); }

  // Calls visit(tensor name, linear index, address, dtype) for every element of every tile.
  template <typename Visit>
  void for_each(Visit visit) {
    for (const Tile& tile : layout_.tiles()) {
      const TensorSpec& tensor = layout_.tensors()[tile.tensor];
      const Dtype dtype = layout_.parameters()[tile.parameter].dtype;
      for (int64_t r = 0; r < tile.box.length[0]; ++r) {
        for (int64_t c = 0; c < tile.box.length[1]; ++c) {
          const int64_t linear =
              (tile.box.offset[0] + r) * tensor.shape[1] + tile.box.offset[1] + c;
          const int64_t at =
              tile.element_offset + r * tile.element_strides[0] + c * tile.element_strides[1];
          visit(tensor.name, linear, data(tile.parameter) + at * dtype_size_bytes(dtype), dtype);
        }
      }
    }
  }

 private:
  Layout layout_;
  std::vector<std::vector<std::byte>> bytes_;
};

// Executes `plan`, each run from a holder of its own choice, and checks sums and sizes on the way.
void execute(Random& random, const Plan& plan, std::vector<Memory>& sources, Memory& target) {
  const CopyTable table(plan);
  uint64_t total = 0;
  for (const Chunk& chunk : plan.chunks()) {
    uint64_t bytes = 0;
    for (uint32_t r = chunk.first_run; r < chunk.first_run + chunk.run_count; ++r) {
      const Run& run = plan.runs()[r];
      const auto holders = plan.holders_of(run);
      const Holder& holder = holders[random.below(holders.size())];
      Memory& source = sources[holder.source_layout];
      const std::byte* const base = source.data(holder.parameter);
      StridedCopy copy = table.copy(run, holder, 0, target.data(run.parameter), true);
      BlockScales scales;
      if (const ScaleRun* at = table.scale_run(run, holder)) {
        const bool writes = run.scales != 0;
        scales = table.block_scales(
            run, holder, writes ? target.data(at->parameter) : nullptr,
            writes ? 0 : static_cast<uint64_t>(source.data(at->parameter) - base));
        copy.scales = &scales;
      }
      EXPECT_EQ(copy.target_bytes(), table.target_bytes(run));
      bytes += copy.target_bytes();
      const uint64_t sum = run_copy(copy, base + copy.source_offset_bytes);
      for (const Holder& other : holders) {
        EXPECT_EQ(sum, table.sum(run, other, [&](uint32_t parameter) {
          return sources[other.source_layout].data(parameter);
        }));
      }
    }
    EXPECT_EQ(bytes, chunk.size_bytes);
    total += bytes;
  }
  copy_fence();
  EXPECT_EQ(total, plan.size_bytes());
  EXPECT_EQ(total, plan.target().tile_bytes());  // with the right bytes: each exactly once
}

Matrix random_matrix(Random& random) {
  Matrix matrix{.name = "w",
                .shape = {1 + static_cast<int64_t>(random.below(40)),
                          1 + static_cast<int64_t>(random.below(40))},
                .block = {}};
  for (int d = 0; d < 2; ++d) {
    const auto block = 1 + static_cast<int64_t>(random.below(random.chance(0.2) ? 60 : 9));
    matrix.block.push_back(std::min(block, matrix.shape[d]));
  }
  return matrix;
}

// True if some tile of some layout holds all of the block that begins at (row, column).
bool held_whole(const Matrix& matrix, const std::vector<Layout>& layouts, int64_t row,
                int64_t column) {
  const int64_t row_end = std::min(row + matrix.block[0], matrix.shape[0]);
  const int64_t column_end = std::min(column + matrix.block[1], matrix.shape[1]);
  return std::ranges::any_of(layouts, [&](const Layout& layout) {
    return std::ranges::any_of(layout.tiles(), [&](const Tile& tile) {
      const Box& box = tile.box;
      return box.offset[0] <= row && box.offset[1] <= column &&
             box.offset[0] + box.length[0] >= row_end &&
             box.offset[1] + box.length[1] >= column_end;
    });
  });
}

TEST(ScaledPlan, I1_QuantisesEveryWorldWhoseBlocksAreHeldWholeAndRefusesTheOthers) {
  int made = 0;
  int refused = 0;
  for (uint64_t seed = 1; seed <= 1500; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const Matrix matrix = random_matrix(random);
    std::vector<Layout> sources;
    const Dims unit = random.chance(0.6) ? matrix.block : Dims{1, 1};
    for (uint64_t copies = 1 + random.below(2); copies > 0; --copies) {
      for (const Box& box : random_boxes(random, matrix.shape, unit, 3)) {
        constexpr Dtype kDtypes[] = {Dtype::kF32, Dtype::kBF16, Dtype::kF16};
        Shard shard(random);
        shard.numbers(matrix, box, kDtypes[random.below(3)]);
        sources.push_back(shard.build());
      }
    }
    Shard engine(random);
    engine.quantization(matrix);
    const bool fused = random.chance(0.4);
    for (const Box& box : random_boxes(random, matrix.shape, matrix.block, 3)) {
      engine.numbers(matrix, box, Dtype::kF8E4M3);
      if (!fused) engine.scales(matrix, scales_box(matrix, box));
    }
    if (fused) engine.scales(matrix, Box::whole(matrix.scales_shape()));
    const Layout target = engine.build();
    const auto plan = compile(target, sources, {.chunk_bytes = 1 + random.below(400)});

    bool possible = true;
    for (int64_t row = 0; row < matrix.shape[0]; row += matrix.block[0]) {
      for (int64_t column = 0; column < matrix.shape[1]; column += matrix.block[1]) {
        possible = possible && held_whole(matrix, sources, row, column);
      }
    }
    ASSERT_EQ(plan.has_value(), possible) << (plan ? "" : plan.error().message);
    if (!possible) {
      ++refused;
      EXPECT_EQ(plan.error().code, ErrorCode::kLayoutMismatch);
      for (const Finding& finding : diagnose(target, sources)) {
        EXPECT_EQ(finding.kind, FindingKind::kBlock) << finding.reason;
      }
      continue;
    }
    ++made;
    std::vector<Memory> memories;
    for (const Layout& layout : plan->source_layouts()) {
      memories.emplace_back(layout).for_each(
          [](const std::string& name, int64_t linear, std::byte* at, Dtype dtype) {
            const uint64_t bits = bits_of(value_of(name, linear), dtype);
            std::memcpy(at, &bits, dtype_size_bytes(dtype));
          });
    }
    Memory memory(target);
    execute(random, *plan, memories, memory);
    const WholeMatrix expected = quantized(matrix);
    memory.for_each([&](const std::string& name, int64_t linear, std::byte* at, Dtype dtype) {
      const auto& whole = name == matrix.name ? expected.numbers : expected.scales;
      const size_t size = dtype_size_bytes(dtype);
      EXPECT_EQ(std::memcmp(at, whole.data() + static_cast<size_t>(linear) * size, size), 0)
          << name << " " << linear;
    });
    if (HasFailure()) return;
  }
  EXPECT_GT(made, 300);
  EXPECT_GT(refused, 100);
}

TEST(ScaledPlan, DequantisesWhereverTheCutsAre) {
  for (uint64_t seed = 1; seed <= 800; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const Matrix matrix = random_matrix(random);
    const WholeMatrix held = quantized(matrix);
    std::vector<Layout> sources;
    for (uint64_t copies = 1 + random.below(2); copies > 0; --copies) {
      for (const Box& box : random_boxes(random, matrix.shape, {1, 1}, 3)) {
        Shard shard(random);
        shard.numbers(matrix, box, Dtype::kF8E4M3);
        shard.scales(matrix, random.chance(0.5) ? scales_box(matrix, box)
                                                : Box::whole(matrix.scales_shape()));
        shard.quantization(matrix);
        sources.push_back(shard.build());
      }
    }
    constexpr Dtype kDtypes[] = {Dtype::kF32, Dtype::kBF16, Dtype::kF16};
    const Dtype wanted = kDtypes[random.below(3)];
    Shard engine(random);
    for (const Box& box : random_boxes(random, matrix.shape, {1, 1}, 3)) {
      engine.numbers(matrix, box, wanted);
    }
    const Layout target = engine.build();
    const auto plan = compile(target, sources, {.chunk_bytes = 1 + random.below(400)});
    ASSERT_TRUE(plan) << plan.error().message;
    std::vector<Memory> memories;
    for (const Layout& layout : plan->source_layouts()) {
      memories.emplace_back(layout).for_each(
          [&](const std::string& name, int64_t linear, std::byte* at, Dtype dtype) {
            const auto& whole = name == matrix.name ? held.numbers : held.scales;
            const size_t size = dtype_size_bytes(dtype);
            std::memcpy(at, whole.data() + static_cast<size_t>(linear) * size, size);
          });
    }
    Memory memory(target);
    execute(random, *plan, memories, memory);
    memory.for_each([&](const std::string&, int64_t linear, std::byte* at, Dtype dtype) {
      const int64_t row = linear / matrix.shape[1];
      const int64_t column = linear % matrix.shape[1];
      const int64_t block =
          row / matrix.block[0] * matrix.scales_shape()[1] + column / matrix.block[1];
      float scale = 0;
      std::memcpy(&scale, held.scales.data() + block * 4, 4);
      const auto number = static_cast<uint8_t>(held.numbers[static_cast<size_t>(linear)]);
      const float value = static_cast<float>(e4m3_value(number)) * scale;
      uint64_t found = 0;
      std::memcpy(&found, at, dtype_size_bytes(dtype));
      EXPECT_EQ(found, bits_of(value, dtype));
    });
    if (HasFailure()) return;
  }
}

// -- what is refused, and what it says --

const Matrix kMatrix = {.name = "w", .shape = {300, 200}, .block = {128, 128}};

Layout engine_of(const Matrix& matrix, const std::vector<Box>& boxes,
                 const std::vector<Box>& scale_boxes) {
  Random random(1);
  Shard shard(random);
  for (const Box& box : boxes) shard.numbers(matrix, box, Dtype::kF8E4M3);
  for (const Box& box : scale_boxes) shard.scales(matrix, box);
  shard.quantization(matrix);
  return shard.build();
}
Layout whole_engine() {
  return engine_of(kMatrix, {Box::whole(kMatrix.shape)}, {Box::whole(kMatrix.scales_shape())});
}
Layout trainer_of(const Box& box, Dtype dtype = Dtype::kBF16) {
  Random random(1);
  Shard shard(random);
  shard.numbers(kMatrix, box, dtype);
  return shard.build();
}

TEST(ScaledPlan, ABlockInTwoSourcesIsRefusedWithTensorBlockAndHolders) {
  const Layout first = trainer_of({{0, 0}, {150, 200}});
  const Layout second = trainer_of({{150, 0}, {150, 200}});
  const std::vector<Layout> sources = {first, second};
  const auto plan = compile(whole_engine(), sources);
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.error().code, ErrorCode::kLayoutMismatch);
  const auto findings = diagnose(whole_engine(), sources);
  ASSERT_EQ(findings.size(), 1U);
  EXPECT_EQ(findings[0].kind, FindingKind::kBlock);
  EXPECT_EQ(findings[0].tensor, "w");
  EXPECT_EQ(findings[0].box, (Box{{128, 0}, {128, 200}}));
  const std::string& reason = findings[0].reason;
  EXPECT_THAT(reason, HasSubstr("block [128:256, 0:128] of tensor \"w\" [300, 200]"));
  EXPECT_THAT(reason, HasSubstr("[128:150, 0:128] in source layout " + first.digest().to_string()));
  EXPECT_THAT(reason,
              HasSubstr("[150:256, 0:128] in source layout " + second.digest().to_string()));
  EXPECT_THAT(reason, HasSubstr("multiples of 128 rows"));
}

TEST(ScaledPlan, ABlockThatNobodyHoldsIsAGap) {
  const std::vector<Layout> sources = {trainer_of({{0, 0}, {256, 200}})};
  const auto findings = diagnose(whole_engine(), sources);
  ASSERT_EQ(findings.size(), 1U);
  EXPECT_EQ(findings[0].kind, FindingKind::kGap);
  EXPECT_EQ(findings[0].box, (Box{{256, 0}, {44, 200}}));
}

std::string reason_of(const Layout& target, const std::vector<Layout>& sources, FindingKind kind) {
  const auto findings = diagnose(target, sources);
  if (findings.empty()) return "nothing";
  EXPECT_EQ(findings[0].kind, kind) << findings[0].reason;
  return findings[0].reason;
}

TEST(ScaledPlan, ATargetThatCutsBlocksIsRefused) {
  const Layout target = engine_of(kMatrix, {{{0, 0}, {150, 200}}, {{150, 0}, {150, 200}}},
                                  {Box::whole(kMatrix.scales_shape())});
  EXPECT_THAT(reason_of(target, {trainer_of(Box::whole(kMatrix.shape))}, FindingKind::kBlock),
              HasSubstr("found a cut through blocks"));
}

TEST(ScaledPlan, I1_ScalesThatNoTileOrTwoTilesWouldWriteAreRefused) {
  const std::vector<Layout> sources = {trainer_of(Box::whole(kMatrix.shape))};
  const Box upper = {{0, 0}, {128, 200}};
  EXPECT_THAT(reason_of(engine_of(kMatrix, {upper}, {Box::whole(kMatrix.scales_shape())}), sources,
                        FindingKind::kBlock),
              HasSubstr("all of its 6 elements, found them for 2"));
  EXPECT_THAT(reason_of(engine_of(kMatrix, {Box::whole(kMatrix.shape)}, {{{0, 0}, {2, 2}}}),
                        sources, FindingKind::kBlock),
              HasSubstr("found none"));
  EXPECT_THAT(reason_of(engine_of(kMatrix, {upper, upper}, {{{0, 0}, {1, 2}}}), sources,
                        FindingKind::kBlock),
              HasSubstr("for it alone, found none"));
  // Twice the numbers with twice the scales: each copy has its own.
  EXPECT_TRUE(
      compile(engine_of(kMatrix, {upper, upper}, {{{0, 0}, {1, 2}}, {{0, 0}, {1, 2}}}), sources));
}

TEST(ScaledPlan, Fp8WithoutItsScalesIsNotQuantisedAgain) {
  EXPECT_THAT(reason_of(whole_engine(), {trainer_of(Box::whole(kMatrix.shape), Dtype::kF8E4M3)},
                        FindingKind::kDtype),
              HasSubstr("no source holds its scales \"w_scale_inv\""));
}

TEST(ScaledPlan, Fp8WithItsScalesIsCopiedAsItIs) {
  const std::vector<Layout> sources = {whole_engine()};
  const Plan plan = compile(whole_engine(), sources).value();
  EXPECT_TRUE(plan.block_scales().empty());
  EXPECT_EQ(plan.size_bytes(), 300U * 200 + 6 * 4);
  // Numbers of which another source has no scales would not fit those that are copied.
  const std::vector<Layout> mixed = {whole_engine(), trainer_of(Box::whole(kMatrix.shape))};
  EXPECT_THAT(reason_of(whole_engine(), mixed, FindingKind::kDtype), HasSubstr("bf16"));
}

TEST(ScaledPlan, SourcesInFp8AndNotAreNotMixedForATargetInNeither) {
  const std::vector<Layout> mixed = {whole_engine(), trainer_of(Box::whole(kMatrix.shape))};
  EXPECT_THAT(
      reason_of(trainer_of(Box::whole(kMatrix.shape), Dtype::kF32), mixed, FindingKind::kDtype),
      HasSubstr("found both"));
}

TEST(ScaledPlan, ScalesThatTheHolderOfTheNumbersLacksAreNamed) {
  const Layout source = engine_of(kMatrix, {Box::whole(kMatrix.shape)}, {{{0, 0}, {2, 2}}});
  EXPECT_THAT(reason_of(trainer_of(Box::whole(kMatrix.shape)), {source}, FindingKind::kBlock),
              HasSubstr("expected their scales [0:3, 0:2] of \"w_scale_inv\""));
}

TEST(ScaledPlan, OneScaleOfAWholeTensorMayHaveAnyShape) {
  for (const Dims& shape : {Dims{}, Dims{1}, Dims{1, 1}}) {
    LayoutBuilder builder;
    const auto tensor = builder.tensor({"w", Dtype::kF8E4M3, {300, 200}});
    const auto scale = builder.tensor({"w_scale", Dtype::kF32, shape});
    builder.tile(tensor, Box::whole({300, 200}),
                 builder.parameter({"w", Dtype::kF8E4M3, 300 * 200}), 0);
    builder.tile(scale, Box::whole(shape), builder.parameter({"w_scale", Dtype::kF32, 1}), 0);
    builder.quantization(tensor, scale, 300, 200);
    const Layout target = builder.build().value();
    const Layout source = trainer_of(Box::whole(kMatrix.shape));
    const Plan plan = compile(target, {&source, 1}, {.chunk_bytes = 1024}).value();
    ASSERT_EQ(plan.runs().size(), 1U);  // however small chunks are
    const Layout back = trainer_of(Box::whole(kMatrix.shape), Dtype::kF32);
    EXPECT_TRUE(compile(back, {&target, 1}));
  }
}

TEST(ScaledPlan, ChunksHoldWholeBlocksOfAboutTheirSize) {
  const Matrix matrix = {.name = "w", .shape = {1000, 1500}, .block = {128, 128}};
  Random random(1);
  Shard shard(random);
  shard.numbers(matrix, Box::whole(matrix.shape), Dtype::kBF16);
  const Layout source = shard.build();
  const Layout target =
      engine_of(matrix, {Box::whole(matrix.shape)}, {Box::whole(matrix.scales_shape())});
  const Plan plan = compile(target, {&source, 1}, {.chunk_bytes = 1 << 16}).value();
  EXPECT_GT(plan.chunks().size(), 20U);
  for (const Chunk& chunk : plan.chunks()) EXPECT_LE(chunk.size_bytes, 1U << 16);
  for (const auto& run : plan.runs()) {
    const Box box = plan.box_of(run);
    for (int d = 0; d < 2; ++d) {
      EXPECT_EQ(box.offset[d] % 128, 0);
      const int64_t end = box.offset[d] + box.length[d];
      EXPECT_TRUE(end % 128 == 0 || end == matrix.shape[d]);
    }
  }
}

}  // namespace
}  // namespace transfuse
