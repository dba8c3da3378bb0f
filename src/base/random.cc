// Random identities from the kernel.
#include "base/random.h"

#include <sys/random.h>
#include <cstdint>

#include "transfuse/result.h"

namespace transfuse {

uint64_t random_identity() {
  uint64_t value = 0;
  while (value == 0) TRANSFUSE_CHECK(getrandom(&value, sizeof value, 0) == sizeof value);
  return value;
}

}  // namespace transfuse
