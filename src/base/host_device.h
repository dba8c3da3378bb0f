// Marks functions that CUDA kernels share with the host, so that the host's tests judge them too.
#pragma once

#ifdef __CUDACC__
#define TRANSFUSE_HOST_DEVICE __host__ __device__
#define TRANSFUSE_NOINLINE __noinline__
#else
#define TRANSFUSE_HOST_DEVICE
#define TRANSFUSE_NOINLINE
#endif

// Before a loop of a constant count whose body indexes arrays that are to stay in registers.
#ifdef __CUDA_ARCH__
#define TRANSFUSE_UNROLL _Pragma("unroll")
#define TRANSFUSE_NO_UNROLL _Pragma("unroll 1")
#else
#define TRANSFUSE_UNROLL
#define TRANSFUSE_NO_UNROLL
#endif
