// The image that nvcc made of copy_kernel.cu.
#include "transport/cuda/kernel_image.h"

namespace transfuse::cuda {
namespace {

#include "transport/cuda/kernel_image.inc"

}  // namespace

const void* kernel_image() { return static_cast<const void*>(kImage); }

}  // namespace transfuse::cuda
