// The sharding-independent checksum, one element at a time.
#include "copy/fingerprint.h"

#include <xxhash.h>

#include <cstdint>
#include <string_view>

#include "transfuse/copy.h"

namespace transfuse {

uint64_t fingerprint_key(std::string_view tensor_name) {
  return XXH3_64bits(tensor_name.data(), tensor_name.size());
}

uint64_t element_fingerprint(uint64_t key, uint64_t linear_index, uint64_t bits,
                             uint32_t element_bytes) {
  const auto index_high = static_cast<uint32_t>(linear_index >> 32);
  const uint32_t scaled = static_cast<uint32_t>(linear_index) * kIndexFactor;
  const MixSeed seed = mix_seed(key, index_high, element_bytes);
  const uint64_t sum = mix_word(scaled + seed.first, seed.second, static_cast<uint32_t>(bits));
  if (element_bytes < 8) return sum;
  const MixSeed upper = mix_seed(key, index_high, kUpperPart);
  return sum + mix_word(scaled + upper.first, upper.second, static_cast<uint32_t>(bits >> 32));
}

}  // namespace transfuse
