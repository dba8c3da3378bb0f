// Items that pass through the stage: strips of contiguous source bytes are read once, in vectors,
// whatever their alignment; target rows are put together from them, in vectors. What lanes do
// before and after the barrier between are two functions, which host tests run lane by lane.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "base/host_device.h"
#include "transport/cuda/device_copy.h"
#include "transport/cuda/device_table.h"

namespace transfuse {

// -- before the barrier --

// One aligned vector. On the device the load goes on while the lane does something else, until
// finish_staging().
TRANSFUSE_HOST_DEVICE inline void stage_vector(std::byte* stage, const std::byte* source) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(stage))),
               "l"(source)
               : "memory");
#else
  std::memcpy(stage, source, kVectorBytes);
#endif
}
// What this lane staged is there; of all lanes after the barrier that follows.
TRANSFUSE_HOST_DEVICE inline void finish_staging() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Of a vector at the edge of a strip: the bytes from `begin` to `end`, for nothing is known of what
// lies beside them. All loads are under way before the first is used.
TRANSFUSE_HOST_DEVICE inline void stage_edge(std::byte* stage, const std::byte* source,
                                             const std::byte* begin, const std::byte* end) {
  Vector v{};
  TRANSFUSE_UNROLL
  for (uint32_t i = 0; i < kVectorBytes; ++i) {
    const std::byte* const at = source + i;
    const uint32_t bits = at >= begin && at < end ? static_cast<uint32_t>(*at) : 0;
    v.word[i / 4] |= bits << (8 * (i % 4));
  }
  std::memcpy(__builtin_assume_aligned(stage, kVectorBytes), &v, kVectorBytes);
}

// Where a strip begins in the stage, but for its source's place in a vector. `unit`: strips of a
// target vector, `skew`: bytes after them.
TRANSFUSE_HOST_DEVICE constexpr uint32_t strip_at(uint32_t strip, uint32_t vectors, uint32_t unit,
                                                  uint32_t skew) {
  return strip * vectors * kVectorBytes + strip / unit * skew;
}

// The lane's share of reading an item into the stage, which begins at a multiple of kVectorBytes.
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE inline void stage_item(const ItemView& view, uint32_t lane,
                                                                std::byte* stage) {
  const uint32_t bytes = source_bytes_of(view.op);
  if (view.walk == RunWalk::kFill) {
    // The longest unit of elements, and the word that is read behind it.
    constexpr uint32_t kPatternBytes = 3 * kVectorBytes;
    for (uint32_t i = lane; i < kPatternBytes; i += view.lanes) stage[i] = view.source[i % bytes];
    return;
  }
  const bool columns = view.walk == RunWalk::kTransposed;
  const uint32_t strips = columns ? view.units : view.rows;
  const uint32_t strip_bytes = (columns ? view.rows : view.units) * bytes;
  const int64_t pitch = columns ? view.source_step : view.source_pitch;
  const uint32_t vectors = strip_vectors(strip_bytes);
  const uint32_t unit = unit_elements(RunWalk::kVectors, view.op);
  const uint32_t skew = columns ? strip_skew(bytes) : 0;
  const uint32_t total = strips * vectors;
  for (uint32_t i = lane; i < total; i += view.lanes) {
    const uint32_t strip = i / vectors;
    const uint32_t vector = i % vectors;
    const std::byte* const begin = view.source + strip * pitch;
    const std::byte* const end = begin + strip_bytes;
    const std::byte* const from =
        begin - reinterpret_cast<uintptr_t>(begin) % kVectorBytes + uint64_t{vector} * kVectorBytes;
    std::byte* const to = stage + strip_at(strip, vectors, unit, skew) + vector * kVectorBytes;
    if (from >= begin && from + kVectorBytes <= end) {
      stage_vector(to, from);
    } else if (from < end) {
      stage_edge(to, from, begin, end);
    }
  }
}

// -- after the barrier --

// The low word of `high`:`low` moved right by `shift` < 32 bits.
TRANSFUSE_HOST_DEVICE inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
#ifdef __CUDA_ARCH__
  return __funnelshift_r(low, high, shift);
#else
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
#endif
}
TRANSFUSE_HOST_DEVICE inline uint32_t load_word(const std::byte* aligned) {
#ifdef __CUDA_ARCH__
  return *reinterpret_cast<const uint32_t*>(aligned);
#else
  uint32_t word;
  std::memcpy(&word, aligned, sizeof(word));
  return word;
#endif
}

// The elements of an item as they lie in the stage.
template <class Cast>
class StagedItem {
 public:
  using Unit = VectorUnit<Cast>;
  using Source = typename Cast::Source;

  TRANSFUSE_HOST_DEVICE StagedItem(const ItemView& view, const std::byte* stage)
      : stage_(stage), columns_(view.walk == RunWalk::kTransposed) {
    if (view.walk == RunWalk::kFill) return;  // every element is the first one
    vectors_ =
        strip_vectors((columns_ ? view.rows : view.units) * static_cast<uint32_t>(sizeof(Source)));
    step_ = sizeof(Source);
    source_ = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(view.source));
    pitch_ = static_cast<uint32_t>(columns_ ? view.source_step : view.source_pitch);
    in_vector_ = kVectorBytes - 1;
  }

  TRANSFUSE_HOST_DEVICE const std::byte* at(uint32_t row, uint32_t unit) const {
    const uint32_t strip = columns_ ? unit : row;
    const uint32_t inside = columns_ ? row : unit;
    return stage_ + strip_at(strip, vectors_, Unit::kElements, columns_ ? kSkew : 0) +
           ((source_ + strip * pitch_) & in_vector_) + inside * step_;
  }
  // Elements unit, unit + 1, ... of a row.
  TRANSFUSE_HOST_DEVICE typename Unit::Loaded load(uint32_t row, uint32_t unit) const {
    typename Unit::Loaded loaded{};
    if (columns_) {
      TRANSFUSE_UNROLL
      for (uint32_t i = 0; i < Unit::kElements; ++i) {
        // Aligned: the table has no others (DeviceTableBuilder::walk_of).
        Source bits;
        std::memcpy(&bits, __builtin_assume_aligned(at(row, unit + i), sizeof(Source)),
                    sizeof(Source));
        put_element(loaded.vector, i, bits);
      }
      return loaded;
    }
    const std::byte* const first = at(row, unit);
    const auto beyond = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first) % 4);
    const std::byte* const words = first - beyond;
    uint32_t low = load_word(words);
    TRANSFUSE_UNROLL
    for (uint32_t i = 0; i < kWords; ++i) {
      const uint32_t high = load_word(words + 4 * (i + 1));
      loaded.vector[i / 4].word[i % 4] = funnel_right(low, high, 8 * beyond);
      low = high;
    }
    return loaded;
  }

 private:
  static constexpr uint32_t kSkew = strip_skew(sizeof(Source));
  static constexpr uint32_t kWords = Unit::kElements * sizeof(Source) / 4;
  static_assert(kWords == 4 * Unit::kSourceVectors);

  const std::byte* stage_;
  uint32_t vectors_ = 0;
  uint32_t step_ = 0;
  uint32_t source_ = 0;  // low halves of the address and of the distance of strips
  uint32_t pitch_ = 0;
  uint32_t in_vector_ = 0;
  bool columns_;
};

// One row of an item at the target: a head of single elements, vectors from a multiple of
// kVectorBytes on, a tail.
template <class Cast>
struct TargetRow {
  static constexpr uint32_t kUnit = VectorUnit<Cast>::kElements;
  static constexpr auto kBytes = static_cast<uint32_t>(sizeof(typename Cast::Target));

  TRANSFUSE_HOST_DEVICE TargetRow(const ItemView& view, uint32_t row)
      : target(view.target + row * view.target_pitch),
        index(view.index + static_cast<uint64_t>(row * view.index_pitch)) {
    const auto past = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(target) % kVectorBytes);
    head = (kVectorBytes - past) % kVectorBytes / kBytes;
    if (head > view.units) head = view.units;
    in_vectors = (view.units - head) / kUnit * kUnit;
  }
  TRANSFUSE_HOST_DEVICE uint64_t index_of(const ItemView& view, uint32_t unit) const {
    return index + static_cast<uint64_t>(unit * view.index_step);
  }

  std::byte* target;
  uint64_t index;
  uint32_t head;
  uint32_t in_vectors;
};

// Which vector of which row is a lane's; the last ones may not be there.
struct Slots {
  TRANSFUSE_HOST_DEVICE Slots(const ItemView& view, uint32_t row_vectors)
      : tiled(view.walk == RunWalk::kTransposed),
        across(tiled ? (row_vectors + kAcross - 1) / kAcross : row_vectors),
        total(tiled ? across * ((view.rows + kDown - 1) / kDown) * (kAcross * kDown)
                    : row_vectors * view.rows) {}
  TRANSFUSE_HOST_DEVICE uint32_t row(uint32_t slot) const {
    return tiled ? slot / (kAcross * kDown) / across * kDown + slot / kAcross % kDown
                 : slot / across;
  }
  TRANSFUSE_HOST_DEVICE uint32_t vector(uint32_t slot) const {
    return tiled ? slot / (kAcross * kDown) % across * kAcross + slot % kAcross : slot % across;
  }

  // A warp makes four vectors of eight rows: whole sectors at the target, and at the source, where
  // the rows are neighbours, different banks of the stage.
  static constexpr uint32_t kAcross = 4;
  static constexpr uint32_t kDown = 8;
  bool tiled;
  uint32_t across;
  uint32_t total;
};

// The lane's share of an item that lies in the stage. With kSums all is summed, also what nobody
// asked for: tables hold either, mostly.
template <class Cast, bool kSums>
TRANSFUSE_HOST_DEVICE uint64_t write_staged(const ItemView& view, uint32_t lane,
                                            const std::byte* stage) {
  using Unit = VectorUnit<Cast>;
  using Element = ElementUnit<Cast>;
  using Row = TargetRow<Cast>;
  std::conditional_t<kSums, Summer<Row::kBytes>, NoSum> sum(view);
  const StagedItem<Cast> staged(view, stage);
  const Slots slots(view, view.units / Row::kUnit);
  for (uint32_t slot = lane; slot < slots.total; slot += view.lanes) {
    const uint32_t number = slots.row(slot);
    if (number >= view.rows) continue;
    const Row row(view, number);
    const uint32_t first = slots.vector(slot) * Row::kUnit;
    if (first >= row.in_vectors) continue;
    const uint32_t unit = row.head + first;
    Unit::template store<true>(row.target + unit * Row::kBytes, staged.load(number, unit),
                               row.index_of(view, unit), sum);
  }
  const bool smooth = view.units % Row::kUnit == 0 &&
                      reinterpret_cast<uintptr_t>(view.target) % kVectorBytes == 0 &&
                      (view.rows == 1 || view.target_pitch % kVectorBytes == 0);
  if (smooth) return sum.sum();
  constexpr uint32_t kEdges = 2 * (Row::kUnit - 1);  // at most, of a row
  for (uint32_t i = lane; i < view.rows * kEdges; i += view.lanes) {
    const Row row(view, i / kEdges);
    const uint32_t edge = i % kEdges;
    if (edge >= view.units - row.in_vectors) continue;
    const uint32_t unit = edge < row.head ? edge : edge + row.in_vectors;
    Element::template store<true>(row.target + unit * Row::kBytes,
                                  Element::load(staged.at(i / kEdges, unit)),
                                  row.index_of(view, unit), sum);
  }
  return sum.sum();
}

// Returns the lane's part of the sum, of no meaning where the item has no fingerprint.
template <bool kSums>
TRANSFUSE_NOINLINE TRANSFUSE_HOST_DEVICE uint64_t write_staged_item(const ItemView& view,
                                                                    uint32_t lane,
                                                                    const std::byte* stage) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isShared(stage));
#endif
  switch (view.op) {
    case ElementOp::kCopy1:
      return write_staged<CopyCast<1>, kSums>(view, lane, stage);
    case ElementOp::kCopy2:
      return write_staged<CopyCast<2>, kSums>(view, lane, stage);
    case ElementOp::kCopy4:
      return write_staged<CopyCast<4>, kSums>(view, lane, stage);
    case ElementOp::kCopy8:
      return write_staged<CopyCast<8>, kSums>(view, lane, stage);
    case ElementOp::kF32ToBF16:
      return write_staged<F32ToBF16Cast, kSums>(view, lane, stage);
    case ElementOp::kF32ToF16:
      return write_staged<F32ToF16Cast, kSums>(view, lane, stage);
    case ElementOp::kBF16ToF32:
      return write_staged<BF16ToF32Cast, kSums>(view, lane, stage);
    case ElementOp::kF16ToF32:
      return write_staged<F16ToF32Cast, kSums>(view, lane, stage);
    default:  // those with scales are in a table of their own
      break;
  }
  return 0;
}

}  // namespace transfuse
