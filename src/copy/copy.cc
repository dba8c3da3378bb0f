// Turns a strided copy into rows and walks them.
#include "copy/copy.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include "copy/cast.h"
#include "copy/element_size.h"
#include "copy/fingerprint.h"
#include "copy/row_kernels.h"
#include "copy/scaled_copy.h"
#include "transfuse/copy.h"
#include "transfuse/result.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace transfuse {
namespace {

// Elements that a strided row gathers at a time: 2 to 8 KiB with both buffers, well inside any
// first-level cache.
constexpr uint64_t kStageElements = 512;
// A transpose walks so many elements of its inner level at a time, so that the cache lines it reads
// are still there for the neighbouring rows.
constexpr uint64_t kTransposeElements = 128;

std::atomic<CopyPath>& chosen_path() {
  static std::atomic<CopyPath> path{best_copy_path()};
  return path;
}

const RowKernels& row_kernels() {
  switch (chosen_path().load(std::memory_order_relaxed)) {
#if defined(__x86_64__)
    case CopyPath::kAvx512:
      return kAvx512Rows;
    case CopyPath::kAvx2:
      return kAvx2Rows;
#endif
#if defined(__aarch64__)
    case CopyPath::kNeon:
      return kNeonRows;
#endif
    default:
      return kPortableRows;
  }
}

// One level of the walk; source and target in bytes.
struct Level {
  uint64_t count = 1;
  int64_t source = 0;
  int64_t target = 0;
  int64_t index = 0;
};

template <typename T>
void move_strided(const std::byte* source, int64_t source_stride, std::byte* target,
                  int64_t target_stride, uint64_t count) {
  for (uint64_t i = 0; i < count; ++i) {
    std::memcpy(target, source, sizeof(T));
    source += source_stride;
    target += target_stride;
  }
}

void move_elements(uint32_t element_bytes, const std::byte* source, int64_t source_stride,
                   std::byte* target, int64_t target_stride, uint64_t count) {
  switch (element_bytes) {
    case 1:
      return move_strided<uint8_t>(source, source_stride, target, target_stride, count);
    case 2:
      return move_strided<uint16_t>(source, source_stride, target, target_stride, count);
    case 4:
      return move_strided<uint32_t>(source, source_stride, target, target_stride, count);
    default:
      return move_strided<uint64_t>(source, source_stride, target, target_stride, count);
  }
}

bool is_cast(ElementOp op) { return source_element_bytes(op) != target_element_bytes(op); }

// One execution of a copy or of a sum. Used from one thread.
class Walk {
 public:
  Walk(const StridedCopy& copy, bool write, bool sum)
      : rows_(row_kernels()),
        op_(copy.op),
        source_bytes_(source_element_bytes(copy.op)),
        target_bytes_(target_element_bytes(copy.op)),
        key_(copy.fingerprint_key),
        write_(write),
        sum_(sum) {
    for (int i = 0; i < 3; ++i) add_level(copy, i);
    choose_inner();
  }

  uint64_t run(const StridedCopy& copy, const std::byte* source) {
    if (copy.element_count() == 0) return 0;
    const Level& outer = levels_[0];
    const Level& inner = levels_[2];
    const uint64_t step = inner_step();
    uint64_t total = 0;
    for (uint64_t first = 0; first < inner.count; first += step) {
      const uint64_t count = inner.count - first < step ? inner.count - first : step;
      for (uint64_t a = 0; a < outer.count; ++a) {
        const auto at = [&](int64_t Level::* stride) {
          return static_cast<int64_t>(a) * (outer.*stride) +
                 static_cast<int64_t>(first) * (inner.*stride);
        };
        total +=
            rows(source + at(&Level::source), write_ ? copy.target + at(&Level::target) : nullptr,
                 count, copy.linear_index + static_cast<uint64_t>(at(&Level::index)));
      }
    }
    return total;
  }

 private:
  // Levels come outermost first; one that continues the level outside it becomes one with it.
  void add_level(const StridedCopy& copy, int i) {
    if (copy.count[i] == 1) return;
    const Level level{.count = copy.count[i],
                      .source = copy.source_stride[i] * source_bytes_,
                      .target = copy.target_stride[i] * target_bytes_,
                      .index = copy.index_stride[i]};
    if (used_ > 0) {
      Level& outside = levels_[2];
      const auto count = static_cast<int64_t>(level.count);
      if (outside.source == level.source * count &&
          (!write_ || outside.target == level.target * count) &&
          (!sum_ || outside.index == level.index * count)) {
        outside = {.count = outside.count * level.count,
                   .source = level.source,
                   .target = level.target,
                   .index = level.index};
        return;
      }
    }
    levels_[0] = levels_[1];
    levels_[1] = levels_[2];
    levels_[2] = level;
    ++used_;
  }

  bool source_unit(const Level& level) const {
    return level.count > 1 && level.source == source_bytes_;
  }
  bool target_unit(const Level& level) const {
    return level.count > 1 && (!write_ || level.target == target_bytes_);
  }

  // The inner level is the one that is contiguous on both sides, else the one that is contiguous at
  // the target (scattered writes cost more than scattered reads), else the planner's.
  void choose_inner() {
    size_t best = 2;
    int best_score = -1;
    for (size_t i = 3; i-- > 0;) {
      const int score = (target_unit(levels_[i]) ? 2 : 0) + (source_unit(levels_[i]) ? 1 : 0);
      if (score > best_score) {
        best = i;
        best_score = score;
      }
    }
    if (best != 2) std::swap(levels_[best], levels_[2]);
    // The neighbour in the source goes next to it, for the sake of the cache lines.
    if (source_unit(levels_[0])) std::swap(levels_[0], levels_[1]);
  }

  uint64_t inner_step() const {
    const bool transpose = !source_unit(levels_[2]) && source_unit(levels_[1]);
    return transpose ? kTransposeElements : levels_[2].count;
  }

  // Sets seed_ for the element with this linear index.
  void seed_at(uint64_t index) {
    const uint64_t high = index >> 32;
    if (high != seeded_high_) {
      seeded_high_ = high;
      lower_ = mix_seed(key_, static_cast<uint32_t>(high), target_bytes_u());
      upper_ = mix_seed(key_, static_cast<uint32_t>(high), kUpperPart);
      seed_.second = lower_.second;
      seed_.upper_second = upper_.second;
      seed_.step = static_cast<uint32_t>(levels_[2].index) * kIndexFactor;
    }
    const uint32_t scaled = static_cast<uint32_t>(index) * kIndexFactor;
    seed_.place = scaled + lower_.first;
    seed_.upper_place = scaled + upper_.first;
  }
  uint32_t target_bytes_u() const { return static_cast<uint32_t>(target_bytes_); }

  // How many of `count` elements have the same upper half of their linear index as the first.
  uint64_t same_high(uint64_t index, uint64_t count) const {
    const auto step = static_cast<uint64_t>(levels_[2].index);
    if (step == 0 || (index + step * (count - 1)) >> 32 == index >> 32) return count;
    const uint64_t to_boundary = (uint64_t{1} << 32) - (index & 0xFFFFFFFFu);
    const uint64_t fit = (to_boundary + step - 1) / step;
    return fit < count ? fit : count;
  }

  // The middle level's rows: one block where they are contiguous and share their seed.
  uint64_t rows(const std::byte* source, std::byte* target, uint64_t count, uint64_t index) {
    const Level& middle = levels_[1];
    const Level& inner = levels_[2];
    const uint64_t last = index + (middle.count - 1) * static_cast<uint64_t>(middle.index) +
                          (count - 1) * static_cast<uint64_t>(inner.index);
    if (contiguous(count) && (!sum_ || last >> 32 == index >> 32)) {
      if (sum_) seed_at(index);
      return kernel({.source = source,
                     .target = target,
                     .count = count,
                     .rows = middle.count,
                     .source_pitch = middle.source,
                     .target_pitch = middle.target,
                     .place_pitch = static_cast<uint32_t>(middle.index) * kIndexFactor});
    }
    uint64_t total = 0;
    for (uint64_t b = 0; b < middle.count; ++b) {
      const auto row_index = static_cast<int64_t>(b);
      total += row(source + row_index * middle.source,
                   write_ ? target + row_index * middle.target : nullptr, count,
                   index + b * static_cast<uint64_t>(middle.index));
    }
    return total;
  }

  bool contiguous(uint64_t count) const {
    return count == 1 ||
           (levels_[2].source == source_bytes_ && (!write_ || levels_[2].target == target_bytes_));
  }

  // One row, cut where the upper half of the linear index changes.
  uint64_t row(const std::byte* source, std::byte* target, uint64_t count, uint64_t index) {
    if (!sum_) return part(source, target, count);
    uint64_t total = 0;
    while (count > 0) {
      const uint64_t n = same_high(index, count);
      seed_at(index);
      total += part(source, target, n);
      count -= n;
      index += n * static_cast<uint64_t>(levels_[2].index);
      source += static_cast<int64_t>(n) * levels_[2].source;
      if (write_) target += static_cast<int64_t>(n) * levels_[2].target;
    }
    return total;
  }

  uint64_t kernel(const RowBlock& block) {
    const auto op = static_cast<size_t>(op_);
    if (!sum_) return rows_.copy[op](block), 0;
    return (write_ ? rows_.copy_sum : rows_.sum)[op](block, seed_);
  }

  // A row of one seed: directly where it is contiguous, through small buffers where it is not.
  uint64_t part(const std::byte* source, std::byte* target, uint64_t count) {
    const Level& inner = levels_[2];
    if (contiguous(count)) return kernel({.source = source, .target = target, .count = count});
    const bool gather = inner.source != source_bytes_;
    const bool scatter = write_ && inner.target != target_bytes_;
    if (!sum_ && !is_cast(op_)) {
      move_elements(target_bytes_u(), source, inner.source, target, inner.target, count);
      return 0;
    }
    alignas(64) std::array<std::byte, kStageElements * 8> gathered;
    alignas(64) std::array<std::byte, kStageElements * 8> scattered;
    uint64_t total = 0;
    for (uint64_t done = 0; done < count; done += kStageElements) {
      const uint64_t n = count - done < kStageElements ? count - done : kStageElements;
      const std::byte* from = source + static_cast<int64_t>(done) * inner.source;
      std::byte* to = write_ ? target + static_cast<int64_t>(done) * inner.target : nullptr;
      if (gather) {
        move_elements(static_cast<uint32_t>(source_bytes_), from, inner.source, gathered.data(),
                      source_bytes_, n);
      }
      total += kernel({.source = gather ? gathered.data() : from,
                       .target = scatter ? scattered.data() : to,
                       .count = n});
      if (scatter) {
        move_elements(target_bytes_u(), scattered.data(), target_bytes_, to, inner.target, n);
      }
      seed_.place += seed_.step * static_cast<uint32_t>(n);
      seed_.upper_place += seed_.step * static_cast<uint32_t>(n);
    }
    return total;
  }

  const RowKernels& rows_;
  const ElementOp op_;
  const int64_t source_bytes_;
  const int64_t target_bytes_;
  const uint64_t key_;
  const bool write_;
  const bool sum_;
  int used_ = 0;
  std::array<Level, 3> levels_;  // outermost first; unused ones count 1
  uint64_t seeded_high_ = std::numeric_limits<uint64_t>::max();
  MixSeed lower_;
  MixSeed upper_;
  RowSeed seed_;
};

}  // namespace

ElementOp plain_copy(uint32_t element_bytes) {
  switch (element_bytes) {
    case 1:
      return ElementOp::kCopy1;
    case 2:
      return ElementOp::kCopy2;
    case 4:
      return ElementOp::kCopy4;
    case 8:
      return ElementOp::kCopy8;
    default:
      check_failed(__FILE__, __LINE__, "elements have 1, 2, 4 or 8 bytes");
  }
}

uint32_t source_element_bytes(ElementOp op) {
  const uint32_t bytes = source_bytes_of(op);
  if (bytes == 0) check_failed(__FILE__, __LINE__, "an ElementOp outside the enum");
  return bytes;
}

uint32_t target_element_bytes(ElementOp op) {
  const uint32_t bytes = target_bytes_of(op);
  if (bytes == 0) check_failed(__FILE__, __LINE__, "an ElementOp outside the enum");
  return bytes;
}

uint64_t StridedCopy::source_end_bytes() const {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  unsigned __int128 last = 0;  // element: three products below 2^95 cannot overflow
  for (int i = 0; i < 3; ++i) {
    if (count[i] == 0) return source_offset_bytes;
    last +=
        static_cast<unsigned __int128>(static_cast<uint64_t>(source_stride[i])) * (count[i] - 1u);
  }
  const unsigned __int128 end = (last + 1) * source_element_bytes(op) + source_offset_bytes;
  return end > kMax ? kMax : static_cast<uint64_t>(end);
}

uint64_t StridedCopy::scales_end_bytes() const {
  constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();
  const bool reads = is_scaled(op) && !quantizes(op) && scales != nullptr;
  if (!reads || scales->fetched != nullptr || element_count() == 0) return 0;
  unsigned __int128 last = 0;
  for (int axis = 0; axis < 2; ++axis) {
    last += static_cast<unsigned __int128>(static_cast<uint64_t>(scales->stride[axis])) *
            (block_count(axis) - 1);
  }
  const unsigned __int128 end = (last + 1) * sizeof(float) + scales->source_offset_bytes;
  return end > kMax ? kMax : static_cast<uint64_t>(end);
}

uint64_t StridedCopy::block_count(int axis) const {
  const uint64_t elements = count[axis + 1];
  if (elements == 0 || scales == nullptr) return 0;
  return (scales->phase[axis] + elements - 1) / scales->block[axis] + 1;
}

uint64_t StridedCopy::target_bytes() const {
  const uint64_t elements = element_count() * target_element_bytes(op);
  if (!quantizes(op)) return elements;
  return elements + block_count(0) * block_count(1) * sizeof(float);
}

namespace {

// Scales belong to the copies that need them, and make sense.
Result<void> check_scales(const StridedCopy& copy) {
  if (is_scaled(copy.op) != (copy.scales != nullptr)) {
    return Error{ErrorCode::kCorrupt, "copy: scales come with fp8 operations, and with no other"};
  }
  if (copy.scales == nullptr) return {};
  const BlockScales& scales = *copy.scales;
  if (copy.count[0] > 1) {
    return Error{ErrorCode::kCorrupt, "copy: one with scales has rows and columns only"};
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (scales.block[axis] == 0 || scales.phase[axis] >= scales.block[axis] ||
        scales.stride[axis] < 0 || scales.index_stride[axis] < 0 ||
        (quantizes(copy.op) && scales.phase[axis] != 0)) {
      return Error{ErrorCode::kCorrupt,
                   "copy: the blocks of axis " + std::to_string(axis) + " are malformed"};
    }
  }
  return {};
}

}  // namespace

Result<void> check_copy(const StridedCopy& copy, uint64_t source_size_bytes,
                        uint64_t scales_size_bytes) {
  for (int i = 0; i < 3; ++i) {
    if (copy.source_stride[i] < 0 || copy.target_stride[i] < 0 || copy.index_stride[i] < 0) {
      return Error{ErrorCode::kCorrupt,
                   "copy: strides are not negative, level " + std::to_string(i) + " has one"};
    }
  }
  TRANSFUSE_RETURN_IF_ERROR(check_scales(copy));
  const unsigned __int128 elements =
      static_cast<unsigned __int128>(uint64_t{copy.count[0]} * copy.count[1]) * copy.count[2];
  if (elements > (uint64_t{1} << 60)) {
    return Error{ErrorCode::kCorrupt, "copy: more than 2^60 elements"};
  }
  const uint64_t end = copy.source_end_bytes();
  if (end > source_size_bytes) {
    return Error{ErrorCode::kCorrupt, "copy reads up to byte " + std::to_string(end) +
                                          " of a region of " + std::to_string(source_size_bytes) +
                                          " bytes"};
  }
  const uint64_t scales_end = copy.scales_end_bytes();
  if (scales_end > scales_size_bytes) {
    return Error{ErrorCode::kCorrupt, "copy reads scales up to byte " + std::to_string(scales_end) +
                                          " of a region of " + std::to_string(scales_size_bytes) +
                                          " bytes"};
  }
  return {};
}

uint64_t run_copy(const StridedCopy& copy, const std::byte* source) {
  if (is_scaled(copy.op)) return run_scaled_copy(copy, source, true, copy.fingerprint);
  return Walk(copy, true, copy.fingerprint).run(copy, source);
}

uint64_t sum_copy(const StridedCopy& copy, const std::byte* source) {
  if (is_scaled(copy.op)) return run_scaled_copy(copy, source, false, true);
  return Walk(copy, false, true).run(copy, source);
}

void copy_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

uint16_t f32_bits_to_bf16(uint32_t bits) { return cast_f32_bits_to_bf16(bits); }
uint16_t f32_bits_to_f16(uint32_t bits) { return cast_f32_bits_to_f16(bits); }
uint32_t bf16_bits_to_f32(uint16_t bits) { return cast_bf16_bits_to_f32(bits); }
uint32_t f16_bits_to_f32(uint16_t bits) { return cast_f16_bits_to_f32(bits); }
uint8_t f32_bits_to_e4m3(uint32_t bits) { return cast_f32_bits_to_e4m3(bits); }
uint32_t e4m3_bits_to_f32(uint8_t bits) { return cast_e4m3_bits_to_f32(bits); }

std::string_view copy_path_name(CopyPath path) {
  switch (path) {
    case CopyPath::kPortable:
      return "portable";
    case CopyPath::kNeon:
      return "neon";
    case CopyPath::kAvx2:
      return "avx2";
    case CopyPath::kAvx512:
      return "avx512";
  }
  check_failed(__FILE__, __LINE__, "a CopyPath outside the enum");
}

bool has_copy_path(CopyPath path) {
  if (path == CopyPath::kPortable) return true;
#if defined(__aarch64__)
  if (path == CopyPath::kNeon) return true;
#endif
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (path == CopyPath::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (path == CopyPath::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  }
#endif
  return false;
}

CopyPath best_copy_path() {
  CopyPath best = CopyPath::kPortable;
  for (const CopyPath path : kCopyPaths) {
    if (has_copy_path(path)) best = path;
  }
  return best;
}
CopyPath copy_path() { return chosen_path().load(std::memory_order_relaxed); }
void force_copy_path(CopyPath path) {
  TRANSFUSE_CHECK(has_copy_path(path));
  chosen_path().store(path, std::memory_order_relaxed);
}

}  // namespace transfuse
