// Little-endian writing, and reading that never leaves its span: what every codec is made of.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

static_assert(std::endian::native == std::endian::little, "the wire format is little-endian");

namespace transfuse {

class ByteWriter {
 public:
  template <std::unsigned_integral T>
  void fixed(T value) {
    out_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void varint(uint64_t value) {  // LEB128
    while (value >= 0x80) {
      out_.push_back(static_cast<char>(value | 0x80));
      value >>= 7;
    }
    out_.push_back(static_cast<char>(value));
  }
  void text(std::string_view value) {
    varint(value.size());
    out_.append(value);
  }
  std::string take() && { return std::move(out_); }
  const std::string& bytes() const { return out_; }

 private:
  std::string out_;
};

// After any read beyond the end (or a malformed varint) ok() is false and every value is zero or
// empty.
class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  explicit ByteReader(std::string_view bytes)
      : bytes_(std::as_bytes(std::span(bytes.data(), bytes.size()))) {}

  template <std::unsigned_integral T>
  T fixed() {
    T value{};
    if (!take(sizeof value)) return T{};
    std::memcpy(&value, bytes_.data() + position_ - sizeof value, sizeof value);
    return value;
  }
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = fixed<uint8_t>();
      if (!ok_) return 0;
      if (shift == 63 && byte > 1) break;
      value |= uint64_t{byte & 0x7Fu} << shift;
      if ((byte & 0x80) == 0) return value;
    }
    ok_ = false;
    return 0;
  }
  // At most `max_size` bytes.
  std::string_view text(uint64_t max_size) {
    const uint64_t size = varint();
    if (!ok_ || size > max_size || !take(size)) {
      ok_ = false;
      return {};
    }
    return {reinterpret_cast<const char*>(bytes_.data() + position_ - size), size};
  }
  // A count of things that take at least `min_bytes_each`: bounded by what is left, so that a lie
  // cannot allocate.
  uint64_t count(uint64_t min_bytes_each) {
    const uint64_t value = varint();
    if (min_bytes_each == 0 || value > remaining() / min_bytes_each) ok_ = false;
    return ok_ ? value : 0;
  }
  bool ok() const { return ok_; }
  uint64_t remaining() const { return bytes_.size() - position_; }
  uint64_t position() const { return position_; }

 private:
  bool take(uint64_t size) {
    if (!ok_ || size > remaining()) {
      ok_ = false;
      return false;
    }
    position_ += size;
    return true;
  }
  std::span<const std::byte> bytes_;
  uint64_t position_ = 0;
  bool ok_ = true;
};

}  // namespace transfuse
