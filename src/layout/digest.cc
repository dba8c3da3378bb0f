// Digests as text.
#include "transfuse/digest.h"

#include <fmt/format.h>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>

#include "transfuse/result.h"

namespace transfuse {
namespace {

constexpr size_t kDigitsPerWord = 16;

std::optional<uint64_t> parse_word(std::string_view digits) {
  uint64_t word = 0;
  const auto [end, error] =
      std::from_chars(digits.data(), digits.data() + digits.size(), word, kDigitsPerWord);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return word;
}

}  // namespace

std::string Digest::to_string() const { return fmt::format("{:016x}{:016x}", high, low); }

Result<Digest> parse_digest(std::string_view text) {
  if (text.size() == 2 * kDigitsPerWord) {
    const auto high = parse_word(text.substr(0, kDigitsPerWord));
    const auto low = parse_word(text.substr(kDigitsPerWord));
    if (high && low) return Digest{.high = *high, .low = *low};
  }
  return Error{ErrorCode::kInvalidArgument,
               fmt::format("expected {} hexadecimal digits, found \"{}\"", 2 * kDigitsPerWord,
                           text.substr(0, 4 * kDigitsPerWord))};
}

}  // namespace transfuse
