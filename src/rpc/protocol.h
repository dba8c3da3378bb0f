// What client and coordinator must agree on before anything else.
#pragma once

#include <cstdint>

namespace transfuse {

inline constexpr uint32_t kProtocol = 3;
inline constexpr const char* kTokenKey = "transfuse-token";  // in the metadata of every call
// A layout (LayoutLimits) is the largest message.
inline constexpr int kMaxMessageBytes = 80 << 20;

}  // namespace transfuse
