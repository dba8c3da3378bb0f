// Files that are not what they claim to be: each is refused by name, and nothing is read beyond it.
#include "files/safetensors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "files/file_fixture.h"
#include "transfuse/checkpoint.h"
#include "transfuse/layout.h"
#include "transfuse/metadata.h"
#include "transfuse/result.h"

namespace transfuse::testing {
namespace {

using Safetensors = FilesTest;
using CheckpointFolder = FilesTest;

// `header` with eight bytes of data: the message of what is wrong with it.
std::string problem_of(const std::string& header, const std::string& data = "12345678") {
  const auto parsed = parse_header("f", header, kLengthBytes + header.size() + data.size());
  if (parsed) return "accepted";
  EXPECT_EQ(parsed.error().code, ErrorCode::kCorrupt) << parsed.error().message;
  return parsed.error().message;
}

TEST(SafetensorsHeader, HeadersThatLieAreRefusedByTensor) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"not json", "no JSON"},
      {"", "no JSON"},
      {"[]", "expected an object"},
      {"7", "expected an object"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} x)", "no JSON"},
      {R"({"a":7})", "tensor a"},
      {R"({"a":{"dtype":"F32","shape":[2]}})", "found fewer"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}})", "found \"more\""},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}})", "twice"},
      {R"({"a":{"dtype":4,"shape":[2],"data_offsets":[0,8]}})", "expected text, found 4"},
      {R"({"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}})", "dtype F31 is not known"},
      {R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}})", "found -2"},
      {R"({"a":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}})", "found 2.0"},
      {R"({"a":{"dtype":"F32","shape":[[2]],"data_offsets":[0,8]}})", "found a list"},
      {R"({"a":{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}})", "found \"2\""},
      {R"({"a":{"dtype":"F32","shape":{},"data_offsets":[0,8]}})", "found an object"},
      {R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,2],"data_offsets":[0,8]}})",
       "at most 8 dimensions"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", "takes 3 elements"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]}})",
       "takes 4611686018427387906 elements"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}})", "2^63"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}})", "[begin, end]"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}})", "[begin, end]"},
      {R"({"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})", "truncated"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "4 belong to no tensor"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", "a gap"},
      {R"({"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},
           "b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       "tensor b: expected to begin at byte 5 of the data, found 4: it overlaps"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
           "a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
       "the name is there twice"},
      {R"({"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "__metadata__"},
      {R"({"__metadata__":{"a":{}},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
       "__metadata__"},
      {R"({})", "8 belong to no tensor"},
  };
  for (const auto& [header, words] : cases) {
    EXPECT_NE(problem_of(header).find(words), std::string::npos) << header << "\n"
                                                                 << problem_of(header);
  }
}

TEST(SafetensorsHeader, WhatThePackageWritesIsAccepted) {
  const auto parsed = parse_header(
      "f",
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
      R"("s":{"dtype":"F32","shape":[],"data_offsets":[4,8]},)"
      R"("e":{"dtype":"F64","shape":[0,3],"data_offsets":[8,8]}}   )",
      8 + 192 + 8);
  ASSERT_FALSE(parsed);  // the size is wrong by what the header is shorter
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
      R"("s":{"dtype":"F32","shape":[],"data_offsets":[4,8]},)"
      R"("e":{"dtype":"F64","shape":[0,3],"data_offsets":[8,8]}}   )";
  const auto good = parse_header("f", header, 8 + header.size() + 8);
  ASSERT_TRUE(good) << good.error().message;
  ASSERT_EQ(good->size(), 3u);
  EXPECT_EQ((*good)[0].name, "b");
  EXPECT_EQ((*good)[0].offset_bytes, 8 + header.size());
  EXPECT_EQ((*good)[1].dtype, std::nullopt);  // F64 exists, but not in layouts
  EXPECT_EQ((*good)[2].shape, Dims{});
}

TEST(SafetensorsHeader, I13_WhatAFileSaysOfItselfIsReadAndBounded) {
  const auto header = [](const std::string& words) {
    return R"({"__metadata__":{"format":"pt")" + words +
           R"(},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  };
  const auto parse = [](const std::string& json, Recorded& recorded) {
    return parse_header("f", json, kLengthBytes + json.size() + 8, &recorded);
  };
  Recorded found;
  ASSERT_TRUE(parse(header(""), found));
  EXPECT_EQ(found, Recorded{});
  ASSERT_TRUE(parse(header(R"(,"transfuse.version":"41","transfuse.kind":"hf_raw",)"
                           R"("transfuse.step":"7","other":"not ours")"),
                    found));
  const Recorded expected{.version = 41, .kind = "hf_raw", .words = {{"step", "7"}}};
  EXPECT_EQ(found, expected);
  std::vector<FileEntry> entries = {{.name = "a", .dtype = Dtype::kF32, .shape = {2}}};
  const std::string head = lay_out(entries, expected).value().substr(kLengthBytes);
  found = {};
  ASSERT_TRUE(parse(head, found));
  EXPECT_EQ(found, expected);

  std::string many;
  for (size_t i = 0; i <= kMaxMetadataEntries; ++i) {
    many += R"(,"transfuse.k)" + std::to_string(i) + R"(":"v")";
  }
  const std::vector<std::pair<std::string, std::string>> cases = {
      {R"(,"transfuse.version":"new")", "expected a number from 1, found \"new\""},
      {R"(,"transfuse.version":"0")", "expected a number from 1"},
      {R"(,"transfuse.kind":"two words")", "without spaces"},
      {R"(,"transfuse.kind":")" + std::string(kMaxKindBytes + 1, 'k') + "\"", "at most 64"},
      {R"(,"transfuse.":"v")", "metadata key"},
      {R"(,"transfuse.two words":"v")", "metadata key"},
      {R"(,"transfuse.k":")" + std::string(kMaxMetadataValueBytes + 1, 'v') + "\"", "at most 1024"},
      {R"(,"transfuse.k":"\u0007")", "printable ASCII"},
      {R"(,"transfuse.k":"v","transfuse.k":"w")", "transfuse.k is there twice"},
      {many, "33 entries"},
  };
  for (const auto& [words, problem] : cases) {
    Recorded none;
    const auto parsed = parse(header(words), none);
    ASSERT_FALSE(parsed) << words;
    EXPECT_EQ(parsed.error().code, ErrorCode::kCorrupt);
    EXPECT_NE(parsed.error().message.find(problem), std::string::npos) << parsed.error().message;
  }
}

TEST_F(Safetensors, FilesThatEndTooEarlyOrNameAHugeHeaderAreRefused) {
  const std::string whole = safetensors({{"a", "F32", {2}, "12345678"}});
  const auto path = folder_ / "a.safetensors";
  for (size_t size = 0; size < whole.size(); ++size) {
    write_file(path, whole.substr(0, size));
    const auto listing = list_checkpoint(path.string());
    ASSERT_FALSE(listing) << size;
    EXPECT_EQ(listing.error().code, ErrorCode::kCorrupt) << listing.error().message;
    EXPECT_NE(listing.error().message.find(path.string()), std::string::npos);
  }
  write_file(path, whole);
  EXPECT_TRUE(list_checkpoint(path.string()));
  // A length of one above the bound, in a (sparse) file that is large enough for it.
  std::string huge = whole;
  const uint64_t length = kMaxHeaderBytes + 1;
  std::copy_n(reinterpret_cast<const char*>(&length), sizeof length, huge.data());
  write_file(path, huge);
  std::filesystem::resize_file(path, 2 * kMaxHeaderBytes);
  const auto listing = list_checkpoint(path.string());
  ASSERT_FALSE(listing);
  EXPECT_EQ(listing.error().code, ErrorCode::kCorrupt);
  EXPECT_NE(listing.error().message.find("at most 100000000"), std::string::npos);
}

TEST_F(Safetensors, WhatIsWrittenIsWhatIsReadBack) {
  std::vector<FileEntry> entries = {{.name = "b", .dtype = Dtype::kBF16, .shape = {3, 2}},
                                    {.name = "a \"quoted\"", .dtype = Dtype::kBF16, .shape = {1}},
                                    {.name = "z", .dtype = Dtype::kI64, .shape = {}}};
  const auto head = lay_out(entries);
  ASSERT_TRUE(head);
  EXPECT_EQ(head->size() % 8, 0u);
  EXPECT_EQ(entries[0].name, "z");  // wide dtypes first
  write_file(folder_ / "f", *head + std::string(8 + 12 + 2, 'x'));
  const auto listing = list_checkpoint((folder_ / "f").string());
  ASSERT_TRUE(listing) << listing.error().message;
  ASSERT_EQ(listing->tensors.size(), 3u);
  for (const StoredTensor& tensor : listing->tensors) {
    const auto entry = std::ranges::find(entries, tensor.name, &FileEntry::name);
    ASSERT_NE(entry, entries.end());
    EXPECT_EQ(tensor.offset_bytes, entry->offset_bytes);
    EXPECT_EQ(tensor.dtype, entry->dtype);
    EXPECT_EQ(tensor.shape, entry->shape);
  }
}

class IndexedFolder : public FilesTest {
 protected:
  void SetUp() override {
    FilesTest::SetUp();
    write_file(folder_ / "one.safetensors", safetensors({{"a", "U8", {2}, "12"}}));
    write_file(folder_ / "two.safetensors", safetensors({{"b", "U8", {2}, "34"}}));
  }
  Error problem(const std::string& index) {
    write_file(folder_ / "model.safetensors.index.json", index);
    const auto listing = list_checkpoint(folder_.string());
    if (listing) return {ErrorCode::kInvalidArgument, "accepted"};
    return listing.error();
  }
};

TEST_F(IndexedFolder, AnIndexThatDisagreesWithItsShardsIsRefused) {
  EXPECT_EQ(problem(R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})").message,
            "accepted");
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"{", "weight_map"},
      {R"({"weight_map":[]})", "weight_map"},
      {R"({"weight_map":{"a":1}})", "tensor a: expected text"},
      {R"({"weight_map":{"a":"../one.safetensors"}})", "expected a file of this folder"},
      {R"({"weight_map":{"a":"one.safetensors","b":"one.safetensors"}})", "puts tensor b into"},
      {R"({"weight_map":{"a":"one.safetensors","c":"two.safetensors"}})", "holds tensor b"},
      {R"({"weight_map":{"b":"one.safetensors","a":"two.safetensors"}})", "puts into two"},
  };
  for (const auto& [index, words] : cases) {
    const Error error = problem(index);
    EXPECT_EQ(error.code, ErrorCode::kCorrupt) << index << "\n" << error.message;
    EXPECT_NE(error.message.find(words), std::string::npos) << index << "\n" << error.message;
  }
}

TEST_F(IndexedFolder, AnIndexThatPointsNowhereNamesTensorAndFile) {
  const Error error = problem(R"({"weight_map":{"a":"one.safetensors","b":"three.safetensors"}})");
  EXPECT_EQ(error.code, ErrorCode::kNotFound);
  EXPECT_NE(error.message.find("tensor b"), std::string::npos) << error.message;
  EXPECT_NE(error.message.find("three.safetensors"), std::string::npos) << error.message;
}

TEST_F(CheckpointFolder, FoldersWithoutOrWithTwoCheckpointsAreRefused) {
  EXPECT_EQ(list_checkpoint(folder_.string()).error().code, ErrorCode::kNotFound);
  EXPECT_EQ(list_checkpoint((folder_ / "none").string()).error().code, ErrorCode::kNotFound);
  const std::string file = safetensors({{"a", "U8", {2}, "12"}});
  write_file(folder_ / "rank0.safetensors", file);
  write_file(folder_ / "rank1.safetensors", file);
  const auto ranks = list_checkpoint(folder_.string());
  ASSERT_TRUE(ranks) << ranks.error().message;
  EXPECT_EQ(ranks->files.size(), 2u);
  EXPECT_EQ(ranks->tensors.size(), 2u);
  write_file(folder_ / "rank3.safetensors", file);
  EXPECT_NE(list_checkpoint(folder_.string()).error().message.find("rank2.safetensors"),
            std::string::npos);
  write_file(folder_ / "model.safetensors", file);
  EXPECT_EQ(list_checkpoint(folder_.string()).error().code, ErrorCode::kInvalidArgument);
}

}  // namespace
}  // namespace transfuse::testing
