// Padding row by row; a device reads its zeros from a few of them.
#include "session/padding.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "copy/copy.h"
#include "session/device_work.h"
#include "session/memory.h"
#include "transfuse/copy.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {
namespace {

constexpr uint64_t kZeroBytes = 64;

// Writes `count` zero elements, `stride` apart.
StridedCopy zero_row(std::byte* target, const std::byte* zeros, uint32_t element_bytes,
                     int64_t count, int64_t stride) {
  StridedCopy copy;
  copy.source_offset_bytes = reinterpret_cast<uintptr_t>(zeros);
  copy.target = target;
  copy.op = plain_copy(element_bytes);
  copy.count[2] = static_cast<uint32_t>(count);
  copy.target_stride[2] = stride;
  return copy;
}

// Calls row(first element, how many, how far apart) for the innermost rows of a box.
template <typename Row>
void for_each_row(const Fill& fill, const Row& row) {
  const int inner = fill.length.rank() - 1;
  if (inner < 0) return row(fill.element_offset, 1, 1);
  if (fill.length.product() == 0) return;
  Dims at = fill.length;
  for (int d = 0; d <= inner; ++d) at[d] = 0;
  const int64_t rows = fill.length.product() / fill.length[inner];
  for (int64_t i = 0; i < rows; ++i) {
    int64_t offset = fill.element_offset;
    for (int d = 0; d < inner; ++d) offset += at[d] * fill.element_strides[d];
    row(offset, fill.length[inner], fill.element_strides[inner]);
    for (int d = inner - 1; d >= 0 && ++at[d] == fill.length[d]; --d) at[d] = 0;
  }
}

}  // namespace

Result<void> fill_padding(Transport& transport, const Layout& layout, const TargetMemory& memory) {
  std::unique_ptr<LocalRegion> zeros;
  if (memory.place == MemoryPlace::kDevice && !layout.fills().empty()) {
    TRANSFUSE_ASSIGN_OR_RETURN(zeros, transport.allocate_on_device(kZeroBytes));
  }
  std::vector<StridedCopy> on_device;
  for (const Fill& fill : layout.fills()) {
    const uint32_t size = dtype_size_bytes(layout.parameters()[fill.parameter].dtype);
    std::byte* const base = memory.data[fill.parameter];
    for_each_row(fill, [&](int64_t offset, int64_t count, int64_t stride) {
      if (zeros != nullptr) {
        on_device.push_back(
            zero_row(base + offset * size, zeros->bytes().data(), size, count, stride));
        return;
      }
      for (int64_t i = 0; i < count; ++i) std::memset(base + (offset + i * stride) * size, 0, size);
    });
  }
  return run_on_device(transport, on_device, {});
}

}  // namespace transfuse
