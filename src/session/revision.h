// The content address of weights that one process holds whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "plan/copies.h"
#include "session/copy_threads.h"
#include "transfuse/layout.h"
#include "transfuse/result.h"
#include "transfuse/transport.h"

namespace transfuse {

// Compiled once; every of() is one pass over the weights. Used from one thread.
class RevisionSum {
 public:
  // kLayoutMismatch names a tensor of which `layout` holds only a part.
  static Result<std::unique_ptr<RevisionSum>> open(const Layout& layout, uint32_t threads);

  // `data(i)` is where parameter i of the layout lies; on the device of `device`, if that is given.
  Result<Digest> of(const std::function<const std::byte*(uint32_t)>& data,
                    Transport* device = nullptr);

 private:
  RevisionSum(CopyTable copies, std::unique_ptr<CopyThreads> threads)
      : copies_(std::move(copies)), threads_(std::move(threads)) {}

  const CopyTable copies_;
  std::unique_ptr<CopyThreads> threads_;
};

}  // namespace transfuse
