// Functions that compile for the host and, under nvcc, for the device. What decides a result stands in them once.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VQOPS_HOST_DEVICE __host__ __device__ __forceinline__
#define VQOPS_PRAGMA(text) _Pragma(#text)
#define VQOPS_UNROLL(times) VQOPS_PRAGMA(unroll times)
#else
#define VQOPS_HOST_DEVICE inline
#define VQOPS_UNROLL(times)
#endif

namespace vqops {

VQOPS_HOST_DEVICE constexpr int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

}  // namespace vqops
