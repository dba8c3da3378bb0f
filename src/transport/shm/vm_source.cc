// A region of memory that another process owns.
#include "transport/shm/vm_source.h"

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "transfuse/copy.h"
#include "transfuse/result.h"
#include "transport/shm/vm_batch.h"

namespace transfuse::shm {

Result<void> VmSource::probe() const {
  if (!process_.held()) {
    return Error{
        ErrorCode::kPermissionDenied,
        fmt::format("process_vm_readv: expected the process of the peer and a pidfd to hold "
                    "it, found {}: it lives in another pid namespace, or the kernel (before "
                    "Linux 5.3) or seccomp of a container refuses pidfd_open. Memory from "
                    "allocate() needs neither",
                    process_.pid() == 0 ? std::string("no pid")
                                        : fmt::format("pid {} only", process_.pid()))};
  }
  std::array<std::byte, 2> ends{};
  VmBatch batch(process_, address_, {});
  StridedCopy copy;
  copy.target = &ends[0];
  TRANSFUSE_RETURN_IF_ERROR(batch.add(copy, nullptr));
  copy.target = &ends[1];
  copy.source_offset_bytes = size_bytes_ - 1;
  TRANSFUSE_RETURN_IF_ERROR(batch.add(copy, nullptr));
  return batch.flush();
}

Result<void> VmSource::read(std::span<const StridedCopy> copies, std::span<uint64_t> fingerprints,
                            std::span<std::byte> scratch) const {
  VmBatch batch(process_, address_, scratch);
  for (size_t i = 0; i < copies.size(); ++i) {
    const bool summed = copies[i].fingerprint && !fingerprints.empty();
    if (summed) fingerprints[i] = 0;
    TRANSFUSE_RETURN_IF_ERROR(batch.add(copies[i], summed ? &fingerprints[i] : nullptr));
  }
  return batch.flush();
}

}  // namespace transfuse::shm
