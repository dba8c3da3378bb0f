// Our kernels for every architecture that they were compiled for, as the driver loads them.
#pragma once

namespace transfuse::cuda {

const void* kernel_image();

}  // namespace transfuse::cuda
