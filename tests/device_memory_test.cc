// What is said of the tables of a device, before there is one, against tables as they are built.
#include "session/device_memory.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "plan/copies.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/memory_need.h"
#include "transfuse/model.h"
#include "transfuse/plan.h"
#include "transfuse/region.h"
#include "transport/cuda/device_table.h"

namespace transfuse {
namespace {

static_assert(sizeof(DeviceRun) == kDeviceRunBytes && sizeof(DeviceItem) == kDeviceItemBytes);

constexpr std::string_view kConfig = R"({
  "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
  "moe_intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 32,
  "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 16,
  "tie_word_embeddings": false})";

std::vector<Layout> layouts_of(std::string_view spec) {
  const ModelConfig config = parse_model_config(kConfig).value();
  return make_layouts(config, parse_parallel_spec(spec).value()).value();
}

TEST(DeviceMemory, TablesAreNoLargerThanWhatWasSaidAndOfItsOrder) {
  for (const auto& [from, to] :
       {std::pair("hf", "hf"), std::pair("fsdp:dp=2,dtype=f32", "vllm:tp=2"),
        std::pair("megatron:tp=2", "vllm:tp=1"), std::pair("vllm:tp=1", "vllm:tp=2")}) {
    for (const bool fingerprint : {false, true}) {
      SCOPED_TRACE(fmt::format("{} to {}, fingerprints {}", from, to, fingerprint));
      const auto target = layouts_of(to)[0];
      const CopyTable copies(
          compile(target, layouts_of(from), plan_options_for(MemoryPlace::kDevice)).value());
      DeviceTableOptions options;
      if (!fingerprint) options.item_bytes = uint64_t{64} << 10;
      DeviceTableBuilder builder(options);
      uint64_t said = 0;
      for (uint32_t i = 0; i < copies.plan().runs().size(); ++i) {
        const auto& run = copies.plan().runs()[i];
        auto* const base = reinterpret_cast<std::byte*>(uintptr_t{1} << 40);  // never read
        const StridedCopy copy =
            copies.copy(run, copies.plan().holders_of(run)[0], 0, base, fingerprint);
        ASSERT_TRUE(builder.add(copy, 0, i));
        said += device_table_bytes(copy.target_bytes());
      }
      const uint64_t built = builder.build(0).size_bytes();
      EXPECT_LE(built, said);
      EXPECT_GE(built, said / 6);
    }
  }
}

}  // namespace
}  // namespace transfuse
