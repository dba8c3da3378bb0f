// The codec: equal layouts are equal bytes, and no bytes do harm.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/random.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

using testing::HasSubstr;

std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

void expect_equal(const Layout& a, const Layout& b) {
  EXPECT_EQ(a.digest(), b.digest());
  EXPECT_TRUE(std::ranges::equal(a.tensors(), b.tensors()));
  EXPECT_TRUE(std::ranges::equal(a.parameters(), b.parameters()));
  EXPECT_TRUE(std::ranges::equal(a.tiles(), b.tiles()));
  EXPECT_TRUE(std::ranges::equal(a.fills(), b.fills()));
  EXPECT_TRUE(std::ranges::equal(a.quantizations(), b.quantizations()));
  EXPECT_EQ(a.kind(), b.kind());
  for (uint32_t i = 0; i < a.tensors().size(); ++i) {
    EXPECT_EQ(a.metadata_of(i), b.metadata_of(i));
  }
  EXPECT_EQ(a.tile_bytes(), b.tile_bytes());
  EXPECT_EQ(a.parameter_bytes(), b.parameter_bytes());
}

// Any rank, whole and partial boxes, dense and sparse strides, several tiles in one parameter.
Layout random_layout(Random& random) {
  LayoutBuilder builder;
  const auto below = [&](uint64_t bound) { return static_cast<int64_t>(random.below(bound)); };
  const int64_t tensors = below(8);
  for (int64_t i = 0; i < tensors; ++i) {
    const std::string name = "model.layers." + std::to_string(below(3)) + ".w" + std::to_string(i);
    const auto dtype = static_cast<Dtype>(below(kDtypeCount));
    Dims shape;
    const int64_t rank = below(kMaxRank + 1);
    for (int64_t d = 0; d < rank; ++d) shape.push_back(1 + below(4));
    const auto t = builder.tensor({name, dtype, shape});
    const auto p = builder.parameter(
        {random.chance(0.5) ? name : "p" + std::to_string(i), dtype, int64_t{1} << 40});
    const int64_t tiles = below(4);
    for (int64_t j = 0; j < tiles; ++j) {
      Box box = Box::whole(shape);
      Dims strides = row_major_strides(shape);
      for (int d = 0; d < box.offset.rank() && random.chance(0.7); ++d) {
        box.offset[d] = below(static_cast<uint64_t>(shape[d]));
        box.length[d] = below(static_cast<uint64_t>(shape[d] - box.offset[d]) + 1);
        strides[d] = 1 + below(1000);
      }
      if (random.chance(0.3)) strides = row_major_strides(box.length);
      builder.tile(t, box, p, below(1 << 20), strides);
    }
    if (random.chance(0.3)) builder.fill(p, below(1000), {below(4), 3}, {1 + below(9), 1});
    Metadata metadata;
    for (int64_t j = random.chance(0.3) ? below(4) : 0; j > 0; --j) {
      metadata["key" + std::to_string(j)] = std::string(random.below(20), 'v');
    }
    builder.metadata(t, metadata);
  }
  for (int64_t i = random.chance(0.3) ? below(3) : -1; i >= 0; --i) {
    const std::string name = "quantized" + std::to_string(i);
    const Dims shape = {1 + below(300), 1 + below(300)};
    const Dims block = {1 + below(400), 1 + below(400)};
    const auto parts = [&](int d) { return (shape[d] + block[d] - 1) / block[d]; };
    const Dims scales_shape = {parts(0), parts(1)};
    const auto t = builder.tensor({name, Dtype::kF8E4M3, shape});
    const auto s = builder.tensor({name + ".scales", Dtype::kF32, scales_shape});
    const auto p = builder.parameter({name, Dtype::kF8E4M3, shape.product()});
    const auto q = builder.parameter({name + ".scales", Dtype::kF32, scales_shape.product()});
    builder.tile(t, Box::whole(shape), p, 0);
    builder.tile(s, Box::whole(scales_shape), q, 0);
    builder.quantization(t, s, block[0], block[1]);
  }
  if (random.chance(0.3)) builder.kind(random.chance(0.5) ? "hf_raw" : "of_our_own");
  return builder.build().value();
}

TEST(LayoutCodec, RoundTripsRandomLayouts) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    const Layout layout = random_layout(random);
    const std::string bytes = encode(layout);
    const auto back = decode_layout(as_bytes(bytes));
    ASSERT_TRUE(back) << back.error().message;
    expect_equal(layout, *back);
    ASSERT_EQ(encode(*back), bytes);
  }
}

TEST(LayoutCodec, EveryTruncationIsCorrupt) {
  for (uint64_t seed = 0; seed < 100; ++seed) {
    Random random(seed);
    const std::string bytes = encode(random_layout(random));
    for (size_t size = 0; size < bytes.size(); ++size) {
      const auto layout = decode_layout(as_bytes(std::string_view(bytes).substr(0, size)));
      ASSERT_FALSE(layout) << "seed " << seed << ", " << size << " of " << bytes.size();
      ASSERT_EQ(layout.error().code, ErrorCode::kCorrupt);
    }
    ASSERT_FALSE(decode_layout(as_bytes(bytes + '\0')));
  }
}

// A flipped bit may give another valid layout; then it is one whose own encoding it is.
TEST(LayoutCodec, EveryFlippedBitIsCorruptOrAnotherCanonicalLayout) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Random random(seed);
    const Layout layout = random_layout(random);
    std::string bytes = encode(layout);
    for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
      const auto mask = static_cast<char>(1U << (bit % 8));
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ mask);
      const auto changed = decode_layout(as_bytes(bytes));
      if (changed) {
        ASSERT_EQ(encode(*changed), bytes);
        ASSERT_NE(changed->digest(), layout.digest());
      } else {
        ASSERT_EQ(changed.error().code, ErrorCode::kCorrupt);
      }
      bytes[bit / 8] = static_cast<char>(bytes[bit / 8] ^ mask);
    }
  }
}

TEST(LayoutCodec, RandomBytesAreCorrupt) {
  Random random(42);
  for (int round = 0; round < 20000; ++round) {
    // Half of them behind a right head, so that they reach the inner parsers.
    std::string bytes = round % 2 == 0 ? "" : encode(Layout()).substr(0, 5);
    const uint64_t size = 1 + random.below(80);
    for (uint64_t i = 0; i < size; ++i) {
      bytes.push_back(static_cast<char>(random.below(random.chance(0.5) ? 8 : 256)));
    }
    const auto layout = decode_layout(as_bytes(bytes));
    if (layout) {
      ASSERT_EQ(encode(*layout), bytes);
    } else {
      ASSERT_EQ(layout.error().code, ErrorCode::kCorrupt);
    }
  }
}

ByteWriter layout_head() {
  ByteWriter out;
  for (const char c : encode(Layout()).substr(0, 5)) out.fixed(static_cast<uint8_t>(c));
  return out;
}

std::string decode_error(const std::string& bytes) {
  const auto layout = decode_layout(as_bytes(bytes));
  if (layout) return "decoded";
  EXPECT_EQ(layout.error().code, ErrorCode::kCorrupt);
  return layout.error().message;
}

TEST(LayoutCodec, CountsBeyondTheMessageAreCorrupt) {
  for (int position = 0; position < 3; ++position) {
    for (const uint64_t count : {uint64_t{1}, uint64_t{1} << 32, UINT64_MAX}) {
      ByteWriter out = layout_head();
      for (int i = 0; i < 3; ++i) out.varint(i == position ? count : 0);
      EXPECT_NE(decode_error(out.bytes()), "decoded") << position << " " << count;
    }
  }
}

// name, kind 1 (tensor), dtype f32, then whatever the caller says.
void put_tensor(ByteWriter& out, uint64_t shared, std::string_view rest, uint8_t dtype,
                uint8_t rank) {
  out.varint(shared);
  out.text(rest);
  out.fixed(uint8_t{1});
  out.fixed(dtype);
  out.fixed(rank);
  for (int i = 0; i < rank; ++i) out.varint(1);
}

TEST(LayoutCodec, NamesDtypesAndRanksAreBounded) {
  const auto with_two = [](uint64_t shared, std::string_view rest, uint8_t dtype, uint8_t rank) {
    ByteWriter out = layout_head();
    out.varint(2);
    put_tensor(out, 0, "abc", 0, 0);
    put_tensor(out, shared, rest, dtype, rank);
    out.varint(0);
    out.varint(0);
    return decode_error(out.bytes());
  };
  EXPECT_EQ(with_two(2, "d", 0, 8), "decoded");
  EXPECT_THAT(with_two(4, "d", 0, 0), HasSubstr("name 1 is malformed"));
  EXPECT_THAT(with_two(2, "c", 0, 0), HasSubstr("not after"));
  EXPECT_THAT(with_two(3, "", 0, 0), HasSubstr("not after"));
  EXPECT_THAT(with_two(0, "b\n", 0, 0), HasSubstr("printable"));
  EXPECT_THAT(with_two(1, "c", 9, 0), HasSubstr("malformed"));
  EXPECT_THAT(with_two(1, "c", 0, 9), HasSubstr("malformed"));
  EXPECT_THAT(with_two(1, std::string(1024, 'x'), 0, 0), HasSubstr("malformed"));
  EXPECT_THAT(with_two(1, "bd", 0, 0), HasSubstr("canonical"));
}

TEST(LayoutCodec, ATileBeyondItsParameterIsCorrupt) {
  for (const uint64_t offset : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 62, UINT64_MAX}) {
    ByteWriter out = layout_head();
    out.varint(1);
    out.varint(0);
    out.text("w");
    out.fixed(uint8_t{3});  // tensor and parameter
    out.fixed(uint8_t{0});
    out.fixed(uint8_t{1});
    out.varint(4);
    out.fixed(uint8_t{0});
    out.varint(4);
    out.varint(1);  // one tile: whole, row-major
    out.varint(0);
    out.fixed(uint8_t{3});
    out.varint(0);
    out.varint(offset);
    out.varint(0);
    EXPECT_EQ(decode_error(out.bytes()) == "decoded", offset == 0) << offset;
  }
}

TEST(LayoutCodec, AnotherMagicOrVersionIsNamed) {
  std::string bytes = encode(Layout());
  bytes[4] = 4;
  EXPECT_THAT(decode_error(bytes), HasSubstr("expected version 1 to 3, found 4"));
  bytes[0] = 'X';
  EXPECT_THAT(decode_error(bytes), HasSubstr("magic"));
}

// A layout with a kind and metadata of one of its two tensors, without its last `cut` bytes.
std::string with_words(size_t cut) {
  LayoutBuilder builder;
  builder.tensor({"a", Dtype::kBF16, {1}});
  builder.metadata(builder.tensor({"b", Dtype::kBF16, {1}}), {{"k", "v"}});
  builder.kind("hf_raw");
  std::string bytes = encode(builder.build().value());
  return bytes.substr(0, bytes.size() - cut);
}

TEST(LayoutCodec, ALayoutWithoutKindAndMetadataHasNoOtherEncodingThanItHadBefore) {
  EXPECT_EQ(encode(Layout())[4], 1);
  EXPECT_EQ(with_words(0)[4], 2);
  // Version 2 that says nothing.
  std::string nothing = encode(Layout());
  nothing[4] = 2;
  nothing += std::string(2, '\0');
  EXPECT_THAT(decode_error(nothing), HasSubstr("not in canonical form"));
  nothing[4] = 3;
  nothing += '\0';
  EXPECT_THAT(decode_error(nothing), HasSubstr("0 quantizations"));
}

TEST(LayoutCodec, KindAndMetadataAreBounded) {
  // The end of with_words(0): kind (size, text), 1 tensor, step 1, 1 entry, size, "k", size, "v".
  constexpr size_t kWordsBytes = 1 + 6 + 3 + 4;
  const auto decoded = [&](std::string_view kind, uint64_t tensors, uint64_t step, uint64_t entries,
                           std::string_view key, std::string_view value) {
    ByteWriter out;
    out.text(kind);
    out.varint(tensors);
    out.varint(step);
    out.varint(entries);
    out.text(key);
    out.text(value);
    return decode_error(with_words(kWordsBytes) + out.bytes());
  };
  EXPECT_EQ(decoded("hf_raw", 1, 1, 1, "k", "v"), "decoded");
  EXPECT_EQ(decoded("hf_raw", 1, 0, 1, "k", ""), "decoded");
  EXPECT_NE(decoded(std::string(kMaxKindBytes + 1, 'k'), 1, 1, 1, "k", "v"), "decoded");
  EXPECT_THAT(decoded("two words", 1, 1, 1, "k", "v"), HasSubstr("without spaces"));
  EXPECT_THAT(decoded("hf_raw", 1, 2, 1, "k", "v"), HasSubstr("metadata of tensor 2"));
  EXPECT_NE(decoded("hf_raw", 1, uint64_t{1} << 63, 1, "k", "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", uint64_t{1} << 60, 1, 1, "k", "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, uint64_t{1} << 60, "k", "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, 1, "", "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, 1, "k\n", "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, 1, "k", std::string("\x01")), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, 1, std::string(kMaxMetadataKeyBytes + 1, 'k'), "v"), "decoded");
  EXPECT_NE(decoded("hf_raw", 1, 1, 1, "k", std::string(kMaxMetadataValueBytes + 1, 'v')),
            "decoded");
}

TEST(LayoutCodec, WritesEachNameOnce) {
  LayoutBuilder builder;
  const std::string name = "model.layers.17.self_attn.q_proj.weight";
  const auto t = builder.tensor({name, Dtype::kBF16, {4}});
  builder.tile(t, Box::whole({4}), builder.parameter({name, Dtype::kBF16, 4}), 0);
  const std::string bytes = encode(builder.build().value());
  const size_t first = bytes.find(name);
  ASSERT_NE(first, std::string::npos);
  EXPECT_EQ(bytes.find(name, first + 1), std::string::npos);
}

Binding example_binding() {
  Binding binding;
  binding.layout = Digest{.high = 0x0123456789ABCDEF, .low = UINT64_MAX};
  binding.places = {{0, 0}, {7, 1 << 20}, {UINT64_MAX, UINT64_MAX}};
  return binding;
}

TEST(BindingCodec, RoundTrips) {
  for (const Binding& binding : {example_binding(), Binding{}}) {
    const auto back = decode_binding(as_bytes(encode(binding)));
    ASSERT_TRUE(back);
    EXPECT_EQ(back->layout, binding.layout);
    EXPECT_EQ(back->places, binding.places);
  }
}

TEST(BindingCodec, TruncatedFlippedAndRandomBytesDoNoHarm) {
  const std::string bytes = encode(example_binding());
  for (size_t size = 0; size < bytes.size(); ++size) {
    const auto binding = decode_binding(as_bytes(bytes.substr(0, size)));
    ASSERT_FALSE(binding);
    ASSERT_EQ(binding.error().code, ErrorCode::kCorrupt);
  }
  EXPECT_FALSE(decode_binding(as_bytes(bytes + '\0')));
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string changed = bytes;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ static_cast<char>(1U << (bit % 8)));
    const auto binding = decode_binding(as_bytes(changed));
    if (binding) {
      ASSERT_EQ(encode(*binding), changed);
    }
  }
  Random random(3);
  for (int round = 0; round < 5000; ++round) {
    std::string changed = bytes.substr(0, random.chance(0.5) ? 21 : 0);
    for (uint64_t i = random.below(40); i > 0; --i) {
      changed.push_back(static_cast<char>(random.below(256)));
    }
    const auto binding = decode_binding(as_bytes(changed));
    if (binding) {
      ASSERT_EQ(encode(*binding), changed);
    }
  }
}

TEST(BindingCodec, ACountBeyondTheMessageIsCorrupt) {
  std::string bytes = encode(Binding{});
  bytes.pop_back();
  ByteWriter count;
  count.varint(uint64_t{1} << 60);
  EXPECT_FALSE(decode_binding(as_bytes(bytes + count.bytes())));
}

}  // namespace
}  // namespace transfuse
