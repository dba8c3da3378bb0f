// Bytes of an element before and after its operation, and what the operation is, where device code
// can ask too.
#pragma once

#include <cstdint>

#include "base/host_device.h"
#include "transfuse/copy.h"

namespace transfuse {

// 0 outside the enum.
TRANSFUSE_HOST_DEVICE constexpr uint32_t source_bytes_of(ElementOp op) {
  switch (op) {
    case ElementOp::kCopy1:
    case ElementOp::kE4M3ToF32:
    case ElementOp::kE4M3ToBF16:
    case ElementOp::kE4M3ToF16:
      return 1;
    case ElementOp::kCopy2:
    case ElementOp::kBF16ToF32:
    case ElementOp::kF16ToF32:
    case ElementOp::kBF16ToE4M3:
    case ElementOp::kF16ToE4M3:
      return 2;
    case ElementOp::kCopy4:
    case ElementOp::kF32ToBF16:
    case ElementOp::kF32ToF16:
    case ElementOp::kF32ToE4M3:
      return 4;
    case ElementOp::kCopy8:
      return 8;
  }
  return 0;
}
TRANSFUSE_HOST_DEVICE constexpr uint32_t target_bytes_of(ElementOp op) {
  switch (op) {
    case ElementOp::kF32ToE4M3:
    case ElementOp::kBF16ToE4M3:
    case ElementOp::kF16ToE4M3:
      return 1;
    case ElementOp::kF32ToBF16:
    case ElementOp::kF32ToF16:
    case ElementOp::kE4M3ToBF16:
    case ElementOp::kE4M3ToF16:
      return 2;
    case ElementOp::kBF16ToF32:
    case ElementOp::kF16ToF32:
    case ElementOp::kE4M3ToF32:
      return 4;
    default:
      return source_bytes_of(op);
  }
}

// quantizes(), for device code.
TRANSFUSE_HOST_DEVICE constexpr bool quantizes_of(ElementOp op) {
  return op == ElementOp::kF32ToE4M3 || op == ElementOp::kBF16ToE4M3 || op == ElementOp::kF16ToE4M3;
}

}  // namespace transfuse
