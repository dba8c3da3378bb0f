// Sizes, names and casts of element types.
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "transfuse/layout.h"
#include "transfuse/result.h"

namespace transfuse {
namespace {

struct DtypeRow {
  std::string_view name;
  uint32_t size_bytes;
};

// In the order of the enum.
constexpr std::array<DtypeRow, kDtypeCount> kDtypes = {{{"f32", 4},
                                                        {"f16", 2},
                                                        {"bf16", 2},
                                                        {"f8e4m3", 1},
                                                        {"f8e5m2", 1},
                                                        {"i8", 1},
                                                        {"u8", 1},
                                                        {"i32", 4},
                                                        {"i64", 8}}};

const DtypeRow& row(Dtype dtype) {
  const auto index = static_cast<size_t>(dtype);
  TRANSFUSE_CHECK(index < kDtypes.size());
  return kDtypes[index];
}

}  // namespace

uint32_t dtype_size_bytes(Dtype dtype) { return row(dtype).size_bytes; }

std::string_view dtype_name(Dtype dtype) { return row(dtype).name; }

Result<Dtype> parse_dtype(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kDtypes.size(); ++i) {
    if (kDtypes[i].name == name) return static_cast<Dtype>(i);
    known += i == 0 ? "" : ", ";
    known += kDtypes[i].name;
  }
  return Error{ErrorCode::kInvalidArgument,
               "dtype \"" + std::string(name) + "\" is not known: expected one of " + known};
}

bool castable(Dtype source, Dtype target) {
  const auto is_half = [](Dtype dtype) { return dtype == Dtype::kBF16 || dtype == Dtype::kF16; };
  return source == target || (source == Dtype::kF32 && is_half(target)) ||
         (is_half(source) && target == Dtype::kF32);
}

}  // namespace transfuse
