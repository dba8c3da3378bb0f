// Refits of engines in fp8 with block scales from trainers in bf16, and back, through real
// sessions.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "copy/copy.h"
#include "copy/slow_copy.h"
#include "session/pretend_device.h"
#include "session/refit_world.h"
#include "session/stored_weights.h"
#include "transfuse/checkpoint.h"
#include "transfuse/control.h"
#include "transfuse/layout.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/publisher.h"
#include "transfuse/receiver.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"
#include "transfuse/verify.h"
#include "transport/local/faulty.h"

namespace transfuse::testing {
namespace {

using ::testing::HasSubstr;
using Numbers = std::map<std::string, std::vector<uint64_t>>;  // bits by tensor

// Two weights in blocks of 16x16, one of them ragged at both ends, and a norm.
constexpr int64_t kBlock = 16;
const Dims kUp = {64, 48};
const Dims kDown = {50, 70};

Dims scales_shape(const Dims& shape) {
  return {(shape[0] + kBlock - 1) / kBlock, (shape[1] + kBlock - 1) / kBlock};
}

// Rows [low, high) of every tensor, scaled to its own count of rows out of 64; in `dtype`.
struct Share {
  int64_t up_low = 0;
  int64_t up_high = 64;
  int64_t down_low = 0;
  int64_t down_high = 50;
  bool norm = true;
};

Layout trainer_layout(const Share& share, Dtype dtype = Dtype::kBF16) {
  LayoutBuilder builder;
  const auto rows = [&](const std::string& name, const Dims& shape, int64_t low, int64_t high) {
    const auto tensor = builder.tensor({name, Dtype::kBF16, shape});
    Box box = Box::whole(shape);
    box.offset[0] = low;
    box.length[0] = high - low;
    builder.tile(tensor, box, builder.parameter({name, dtype, box.element_count()}), 0);
  };
  rows("up.weight", kUp, share.up_low, share.up_high);
  rows("down.weight", kDown, share.down_low, share.down_high);
  if (share.norm) rows("norm.weight", {48}, 0, 48);
  return builder.build().value();
}

Layout engine_layout() {
  LayoutBuilder builder;
  const auto whole = [&](const std::string& name, Dtype dtype, const Dims& shape) {
    const auto tensor = builder.tensor({name, Dtype::kBF16, shape});
    builder.tile(tensor, Box::whole(shape), builder.parameter({name, dtype, shape.product()}), 0);
    return tensor;
  };
  for (const auto& [name, shape] : {std::pair("up.weight", kUp), std::pair("down.weight", kDown)}) {
    const auto tensor = whole(name, Dtype::kF8E4M3, shape);
    const auto scales =
        builder.tensor({std::string(name) + "_scale_inv", Dtype::kF32, scales_shape(shape)});
    builder.tile(scales, Box::whole(scales_shape(shape)),
                 builder.parameter({std::string(name) + "_scale_inv", Dtype::kF32,
                                    scales_shape(shape).product()}),
                 0);
    builder.quantization(tensor, scales, kBlock, kBlock);
  }
  whole("norm.weight", Dtype::kBF16, {48});
  return builder.build().value();
}

// What an engine must hold of `version`, by the slow model.
Numbers expected_numbers(uint64_t version) {
  Numbers numbers;
  for (const auto& [name, shape] :
       {std::pair(std::string("up.weight"), kUp), std::pair(std::string("down.weight"), kDown)}) {
    std::vector<uint16_t> values;
    for (int64_t i = 0; i < shape.product(); ++i) {
      values.push_back(f32_bits_to_bf16(std::bit_cast<uint32_t>(element_value(version, name, i))));
    }
    std::vector<std::byte> written(values.size());
    std::vector<std::byte> scales(static_cast<size_t>(scales_shape(shape).product()) * 4);
    const BlockScales blocks{.block = {kBlock, kBlock}, .stride = {scales_shape(shape)[1], 1}};
    StridedCopy copy;
    copy.op = ElementOp::kBF16ToE4M3;
    copy.scales = &blocks;
    for (int d = 0; d < 2; ++d) {
      copy.count[d + 1] = static_cast<uint32_t>(shape[d]);
      copy.source_stride[d + 1] = copy.target_stride[d + 1] = d == 0 ? shape[1] : 1;
    }
    slow_scaled_copy(copy, reinterpret_cast<const std::byte*>(values.data()), written.data(),
                     scales.data());
    for (const std::byte b : written) numbers[name].push_back(static_cast<uint64_t>(b));
    for (size_t i = 0; i < scales.size(); i += 4) {
      uint32_t bits = 0;
      std::memcpy(&bits, scales.data() + i, 4);
      numbers[name + "_scale_inv"].push_back(bits);
    }
  }
  for (int64_t i = 0; i < 48; ++i) {
    numbers["norm.weight"].push_back(
        f32_bits_to_bf16(std::bit_cast<uint32_t>(element_value(version, "norm.weight", i))));
  }
  return numbers;
}

Numbers numbers_of(Parameters& parameters) {
  Numbers numbers;
  parameters.for_each([&](const TensorSpec& tensor, int64_t linear, std::byte* at, Dtype dtype) {
    auto& of_tensor = numbers[tensor.name];
    of_tensor.resize(static_cast<size_t>(tensor.shape.product()));
    uint64_t bits = 0;
    std::memcpy(&bits, at, dtype_size_bytes(dtype));
    of_tensor[static_cast<size_t>(linear)] = bits;
  });
  return numbers;
}

// Numbers of an engine in fp8, read under their scales.
Numbers dequantised(const Numbers& stored) {
  Numbers expected;
  for (const auto& [name, shape] :
       {std::pair(std::string("up.weight"), kUp), std::pair(std::string("down.weight"), kDown)}) {
    for (int64_t i = 0; i < shape.product(); ++i) {
      const int64_t block = i / shape[1] / kBlock * scales_shape(shape)[1] + i % shape[1] / kBlock;
      const auto scale = std::bit_cast<float>(
          static_cast<uint32_t>(stored.at(name + "_scale_inv")[static_cast<size_t>(block)]));
      const auto number = static_cast<uint8_t>(stored.at(name)[static_cast<size_t>(i)]);
      expected[name].push_back(f32_bits_to_bf16(
          std::bit_cast<uint32_t>(static_cast<float>(e4m3_value(number)) * scale)));
    }
  }
  expected["norm.weight"] = stored.at("norm.weight");
  return expected;
}

class ScaledRefit : public ::testing::Test {
 protected:
  std::unique_ptr<Transport> transport_ = open_local_transport().value();
  std::unique_ptr<Control> control_ = open_local_control();
};

TEST_F(ScaledRefit, TrainersInBf16FillAnEngineInFp8) {
  Trainer first(*transport_, *control_, trainer_layout({0, 32, 0, 16}), "t0", 2);
  Trainer second(*transport_, *control_, trainer_layout({32, 64, 16, 50, false}), "t1", 2);
  Engine engine(*transport_, *control_, engine_layout());
  for (uint64_t version = 1; version <= 3; ++version) {
    first.publish(version);
    second.publish(version);
    const auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->size_bytes, engine_layout().tile_bytes());
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
    EXPECT_EQ(numbers_of(engine.parameters), expected_numbers(version));
  }
}

TEST_F(ScaledRefit, AShardThatCutsABlockIsRefusedWithWhatItCuts) {
  Trainer first(*transport_, *control_, trainer_layout({0, 40, 0, 16}), "t0", 2);
  Trainer second(*transport_, *control_, trainer_layout({40, 64, 16, 50, false}), "t1", 2);
  first.publish(1);
  second.publish(1);
  Engine engine(*transport_, *control_, engine_layout());
  const auto report = engine.refit({}, 2000);
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, ErrorCode::kLayoutMismatch);
  EXPECT_THAT(report.error().message, HasSubstr("block [32:48, 0:16] of tensor \"up.weight\""));
  EXPECT_THAT(report.error().message, HasSubstr("[32:40, 0:16] in source layout"));
}

TEST_F(ScaledRefit, AnEngineInFp8FillsOthersInFp8AsTheyAreAndInBf16) {
  Trainer trainer(*transport_, *control_, trainer_layout({}), "t0", 1);
  Engine engine(*transport_, *control_, engine_layout());
  trainer.publish(1);
  ASSERT_TRUE(engine.refit());
  // What the engine holds is published as a model of its own.
  const auto other_control = open_local_control();
  const uint64_t size = Parameters::size_bytes(engine_layout());
  const auto arena = transport_->allocate(size).value();
  Parameters held(engine_layout(), arena->bytes());
  PublisherOptions options;
  options.name = "fp8";
  options.source_count = 1;
  options.fingerprint_threads = 1;
  options.arenas = {arena.get()};
  const auto publisher = value_or_fail(
      Publisher::open(*transport_, *other_control, engine_layout(), held.memory(), options),
      "publisher");
  ASSERT_TRUE(publisher->begin_write(1));
  for (size_t i = 0; i < held.buffers().size(); ++i) {
    std::ranges::copy(engine.parameters.buffers()[i], held.buffers()[i].begin());
  }
  ASSERT_TRUE(publisher->publish(1));

  Engine same(*transport_, *other_control, engine_layout(), "same");
  ASSERT_TRUE(same.refit());
  EXPECT_EQ(numbers_of(same.parameters), numbers_of(engine.parameters));

  Engine wide(*transport_, *other_control, trainer_layout({}), "wide");
  const auto report = wide.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
  EXPECT_EQ(numbers_of(wide.parameters), dequantised(expected_numbers(1)));
}

// A trainer in fp8 each of whose parameters is a region of its own, as an allocator gives them;
// others lie between them.
class ScatteredFp8 {
 public:
  ScatteredFp8(Transport& transport, Control& control, const Numbers& numbers) {
    const Layout layout = engine_layout();
    PublisherOptions options;
    options.name = "fp8";
    options.fingerprint_threads = 1;
    std::vector<ParameterMemory> memory;
    for (const ParameterSpec& spec : layout.parameters()) {
      const uint64_t element = dtype_size_bytes(spec.dtype);
      auto& buffer = buffers_.emplace_back(static_cast<uint64_t>(spec.element_count) * element);
      for (size_t i = 0; i < numbers.at(spec.name).size(); ++i) {
        std::memcpy(buffer.data() + i * element, &numbers.at(spec.name)[i], element);
      }
      regions_.push_back(value_or_fail(transport.register_memory(buffer), "region"));
      options.arenas.push_back(regions_.back().get());
      memory.push_back({.name = spec.name, .data = buffer.data(), .size_bytes = buffer.size()});
    }
    publisher_ =
        value_or_fail(Publisher::open(transport, control, layout, memory, options), "publisher");
    EXPECT_TRUE(publisher_->begin_write(1));
    EXPECT_TRUE(publisher_->publish(1));
  }

 private:
  std::deque<std::vector<std::byte>> buffers_;
  std::vector<std::unique_ptr<LocalRegion>> regions_;
  std::unique_ptr<Publisher> publisher_;
};

TEST_F(ScaledRefit, Fp8AndScalesInTwoRegionsFillATargetInBf16) {
  const Numbers stored = expected_numbers(1);
  const ScatteredFp8 source(*transport_, *control_, stored);
  for (const uint64_t chunk_bytes : {uint64_t{512}, uint64_t{1} << 20}) {
    ReceiverOptions options;
    options.plan.chunk_bytes = chunk_bytes;
    Engine wide(*transport_, *control_, trainer_layout({}), "wide", options);
    const auto report = wide.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
    EXPECT_EQ(numbers_of(wide.parameters), dequantised(stored));
  }
}

// The same where all regions are one request's.
TEST_F(ScaledRefit, OnADeviceFp8AndScalesInTwoRegionsFillATargetInBf16) {
  testing::PretendDevice device(open_local_transport().value());
  const Numbers stored = expected_numbers(1);
  const ScatteredFp8 source(device, *control_, stored);
  Engine wide(device, *control_, trainer_layout({0, 50, 3, 41}), "wide");
  const auto report = wide.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
  EXPECT_EQ(device.joined_requests(), 1U);
  Numbers expected = dequantised(stored);
  std::fill(expected["up.weight"].begin() + 50 * 48, expected["up.weight"].end(), 0);
  std::fill(expected["down.weight"].begin(), expected["down.weight"].begin() + 3 * 70, 0);
  std::fill(expected["down.weight"].begin() + 41 * 70, expected["down.weight"].end(), 0);
  EXPECT_EQ(numbers_of(wide.parameters), expected);
}

// A device that reads a region of the host by itself may have to have another one staged.
TEST_F(ScaledRefit, NumbersWhoseScalesDoNotJoinAreReadByThemselves) {
  testing::PretendDevice device(open_local_transport().value());
  const Layout layout = engine_layout();
  const auto scales = layout.find_parameter("up.weight_scale_inv");
  ASSERT_TRUE(scales);
  const ParameterSpec& spec = layout.parameters()[*scales];
  device.keep_apart(static_cast<uint64_t>(spec.element_count) * dtype_size_bytes(spec.dtype));
  const Numbers stored = expected_numbers(1);
  const ScatteredFp8 source(device, *control_, stored);
  Engine wide(device, *control_, trainer_layout({}), "wide");
  const auto report = wide.refit();
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
  EXPECT_EQ(device.joined_requests(), 1U) << "of what does join";
  EXPECT_EQ(numbers_of(wide.parameters), dequantised(stored));
}

TEST_F(ScaledRefit, FaultsOfTheTransportNeverLeaveWrongNumbersOrScales) {
  const auto transport = value_or_fail(open_faulty_local_transport({}), "faulty transport");
  Trainer trainer(*transport, *control_, trainer_layout({}), "t0", 1);
  ReceiverOptions options;
  options.plan.chunk_bytes = 512;
  Engine engine(*transport, *control_, engine_layout(), "engine0", options);
  FaultPlan plan;
  plan.seed = 11;
  plan.delay_ms = 2;
  plan.chance[static_cast<size_t>(Fault::kCorrupt)] = 0.1;
  plan.chance[static_cast<size_t>(Fault::kDelay)] = 0.1;
  transport->set_plan(plan);
  uint64_t good = 0;
  for (uint64_t version = 1; version <= 12; ++version) {
    trainer.publish(version);
    const auto report = engine.refit();
    if (!report) continue;
    ++good;
    EXPECT_EQ(numbers_of(engine.parameters), expected_numbers(version));
  }
  EXPECT_GT(good, 0U);
  EXPECT_GT(transport->fault_count(Fault::kCorrupt), 0U);
}

TEST_F(ScaledRefit, VerifyComparesAnEngineInFp8WithItsTrainerInBf16) {
  Trainer trainer(*transport_, *control_, trainer_layout({}), "t0", 1);
  Engine engine(*transport_, *control_, engine_layout());
  trainer.publish(1);
  ASSERT_TRUE(engine.refit());
  const auto same = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(same) << same.error().to_string();
  EXPECT_TRUE(same->matches()) << same->to_text();
  const uint32_t scales =
      engine.parameters.layout().find_parameter("down.weight_scale_inv").value();
  engine.parameters.buffers()[scales][5] ^= std::byte{1};
  const auto other = verify_model(*transport_, *control_, "model", Deadline::after_ms(10000));
  ASSERT_TRUE(other) << other.error().to_string();
  ASSERT_EQ(other->targets.size(), 1U);
  ASSERT_EQ(other->targets[0].mismatches.size(), 1U);
  EXPECT_EQ(other->targets[0].mismatches[0].tensor, "down.weight");
}

TEST_F(ScaledRefit, ACheckpointInBf16FillsAnEngineInFp8WhereNobodyPublishes) {
  std::string folder = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  Parameters stored(trainer_layout({}));
  stored.write(7);
  write_rank(std::filesystem::path(folder) / "model.safetensors", stored, 7);
  for (const ReceiveInto into : {ReceiveInto::kInPlace, ReceiveInto::kShadow}) {
    ReceiverOptions options;
    options.into = into;
    options.checkpoint = Checkpoint{.path = folder, .spec = "hf"};
    options.checkpoint_wait_ms = 50;
    const bool in_place = into == ReceiveInto::kInPlace;
    Engine engine(*transport_, *control_, engine_layout(), in_place ? "in_place" : "shadow",
                  options);
    const auto report = engine.refit();
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->verified_bytes, report->size_bytes);
    EXPECT_EQ(numbers_of(engine.parameters), expected_numbers(7));
  }
  std::filesystem::remove_all(folder);
}

// A model as published in fp8, and its trainer, which knows nothing of fp8.
constexpr const char* kSmallDeepseek = R"({"model_type": "deepseek_v3", "attention_bias": false,
  "first_k_dense_replace": 1, "hidden_size": 32, "intermediate_size": 48, "kv_lora_rank": 20,
  "moe_intermediate_size": 16, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 4,
  "n_shared_experts": 1, "num_attention_heads": 4, "num_hidden_layers": 3,
  "num_key_value_heads": 4, "num_nextn_predict_layers": 0, "q_lora_rank": 24,
  "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "tie_word_embeddings": false,
  "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 8, "vocab_size": 67,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [8, 8]}})";

ModelConfig small_deepseek(bool fp8) {
  ModelConfig config = value_or_fail(parse_model_config(kSmallDeepseek), "config");
  if (!fp8) config.scale_block_rows = config.scale_block_columns = 0;
  return config;
}

std::vector<Layout> deepseek_layouts(bool fp8, const std::string& spec) {
  return value_or_fail(
      make_layouts(small_deepseek(fp8), value_or_fail(parse_parallel_spec(spec), "spec")),
      "layouts");
}

TEST_F(ScaledRefit, DeepseekInBf16FillsVllmInFp8AndTheFp8OfAnyEngineIsTheSame) {
  const auto trainers = deepseek_layouts(false, "hf");
  ASSERT_EQ(trainers.size(), 1U);
  Trainer trainer(*transport_, *control_, trainers[0], "t0", 1);
  trainer.publish(1);
  std::map<std::string, uint64_t> sums;  // of every tensor, over what all engines hold of it
  for (const char* spec : {"hf", "vllm:tp=2", "sglang:tp=2", "vllm:tp=2,ep"}) {
    SCOPED_TRACE(spec);
    std::map<std::string, std::map<int64_t, uint64_t>> numbers;
    for (const Layout& layout : deepseek_layouts(true, spec)) {
      ASSERT_FALSE(layout.quantizations().empty());
      Engine engine(*transport_, *control_, layout, "engine");
      const auto report = engine.refit();
      ASSERT_TRUE(report) << report.error().to_string();
      EXPECT_EQ(report->verified_bytes, report->size_bytes);
      engine.parameters.for_each(
          [&](const TensorSpec& tensor, int64_t linear, std::byte* at, Dtype dtype) {
            uint64_t bits = 0;
            std::memcpy(&bits, at, dtype_size_bytes(dtype));
            const auto [known, fresh] = numbers[tensor.name].emplace(linear, bits);
            EXPECT_EQ(known->second, bits) << tensor.name;
          });
    }
    ASSERT_TRUE(numbers.contains("model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"));
    for (const auto& [name, elements] : numbers) {
      uint64_t sum = 0;
      for (const auto& [linear, bits] : elements) {
        sum += element_fingerprint(fingerprint_key(name), static_cast<uint64_t>(linear), bits, 8);
      }
      EXPECT_EQ(sums.emplace(name, sum).first->second, sum) << name;
    }
  }
}

// Whether one source tile holds all of the tensor's block (row, column).
bool held_whole(const std::vector<Layout>& sources, const TensorSpec& tensor, int64_t row,
                int64_t column) {
  const int64_t low[2] = {row * 8, column * 8};
  const int64_t high[2] = {std::min(low[0] + 8, tensor.shape[0]),
                           std::min(low[1] + 8, tensor.shape[1])};
  return std::ranges::any_of(sources, [&](const Layout& source) {
    const auto held = source.find_tensor(tensor.name);
    if (!held) return false;
    return std::ranges::any_of(source.tiles_of(*held), [&](const Tile& tile) {
      return tile.box.offset[0] <= low[0] && tile.box.offset[1] <= low[1] &&
             tile.box.offset[0] + tile.box.length[0] >= high[0] &&
             tile.box.offset[1] + tile.box.length[1] >= high[1];
    });
  });
}

// Tensors with a block that an engine holds and no single source.
std::set<std::string> cut_tensors(const std::vector<Layout>& sources, const Layout& engine) {
  std::set<std::string> cut;
  for (const Quantization& q : engine.quantizations()) {
    const TensorSpec& tensor = engine.tensors()[q.tensor];
    for (const Tile& tile : engine.tiles_of(q.tensor)) {
      const Box& box = tile.box;
      for (int64_t i = box.offset[0] / 8; i * 8 < box.offset[0] + box.length[0]; ++i) {
        for (int64_t j = box.offset[1] / 8; j * 8 < box.offset[1] + box.length[1]; ++j) {
          if (!held_whole(sources, tensor, i, j)) cut.insert(tensor.name);
        }
      }
    }
  }
  return cut;
}

TEST_F(ScaledRefit, PairsOfLayoutsAreRefusedWhereNoSourceHoldsABlockAndOnlyThere) {
  int made = 0;
  int refused = 0;
  for (const char* from : {"hf", "fsdp:dp=2", "fsdp:dp=3", "fsdp:dp=4", "fsdp:dp=5", "fsdp:dp=8"}) {
    const std::vector<Layout> sources = deepseek_layouts(false, from);
    for (const char* to : {"hf", "vllm:tp=2", "sglang:tp=2", "vllm:tp=2,ep"}) {
      for (const Layout& engine : deepseek_layouts(true, to)) {
        SCOPED_TRACE(std::string(from) + " -> " + to);
        const std::set<std::string> expected = cut_tensors(sources, engine);
        std::set<std::string> found;
        for (const Finding& finding : diagnose(engine, sources)) {
          EXPECT_EQ(finding.kind, FindingKind::kBlock) << finding.reason;
          found.insert(finding.tensor);
        }
        EXPECT_EQ(found, expected);
        EXPECT_EQ(compile(engine, sources, {}).has_value(), expected.empty());
        ++(expected.empty() ? made : refused);
      }
    }
  }
  EXPECT_GT(made, 5);
  EXPECT_GT(refused, 8);
}

TEST_F(ScaledRefit, ACheckpointInFp8FillsAnEngineInBf16) {
  Trainer trainer(*transport_, *control_, deepseek_layouts(false, "hf")[0], "t0", 1);
  Engine fp8(*transport_, *control_, deepseek_layouts(true, "hf")[0], "fp8");
  trainer.publish(1);
  ASSERT_TRUE(fp8.refit());
  Numbers stored = numbers_of(fp8.parameters);
  std::string folder = (std::filesystem::temp_directory_path() / "transfuse-XXXXXX").string();
  ASSERT_NE(mkdtemp(folder.data()), nullptr);
  std::ofstream(std::filesystem::path(folder) / "config.json") << kSmallDeepseek;
  write_rank(std::filesystem::path(folder) / "model.safetensors", fp8.parameters, 7);

  const auto nobody = open_local_control();
  ReceiverOptions options;
  options.checkpoint = Checkpoint{.path = folder, .spec = "hf"};
  options.checkpoint_wait_ms = 50;
  Engine wide(*transport_, *nobody, deepseek_layouts(false, "vllm")[0], "wide", options);
  const auto report = wide.refit();
  std::filesystem::remove_all(folder);
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->verified_bytes, report->size_bytes);
  uint64_t dequantised = 0;
  wide.parameters.for_each([&](const TensorSpec& tensor, int64_t linear, std::byte* at,
                               Dtype dtype) {
    uint64_t found = 0;
    std::memcpy(&found, at, dtype_size_bytes(dtype));
    uint64_t expected = stored.at(tensor.name)[static_cast<size_t>(linear)];
    const auto scales = stored.find(tensor.name + "_scale_inv");
    if (scales != stored.end()) {
      const int64_t columns = tensor.shape[1];
      const int64_t block = linear / columns / 8 * ((columns + 7) / 8) + linear % columns / 8;
      const auto scale =
          std::bit_cast<float>(static_cast<uint32_t>(scales->second[static_cast<size_t>(block)]));
      const float value = static_cast<float>(e4m3_value(static_cast<uint8_t>(expected))) * scale;
      expected = f32_bits_to_bf16(std::bit_cast<uint32_t>(value));
      ++dequantised;
    }
    EXPECT_EQ(found, expected) << tensor.name << " " << linear;
  });
  EXPECT_GT(dequantised, 10000U);
}

}  // namespace
}  // namespace transfuse::testing
