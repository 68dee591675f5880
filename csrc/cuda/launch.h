// Launches on a stream of a GPU. Nothing of tensors: units of kernels alone do without torch's stable headers, of which
// nvcc makes ten seconds.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include "block.h"
#include "runs.h"

namespace vqops::cuda {

inline void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

template <class Kernel>
constexpr bool kNeedsWgmma = requires { requires Kernel::Cores::kWarpgroups; };

// Blocks of an SM that registers must suffice for; 0: the compiler's choice, which spills where many seem to fit.
template <class Kernel>
constexpr int blocks_at_once() {
    if constexpr (requires { Kernel::Codes::kBlocksAtOnce; }) return Kernel::Codes::kBlocksAtOnce;
    return requires { requires Kernel::kAllRegisters; } ? 1 : 0;
}

// With a loader there are more threads than work.
template <class Kernel>
constexpr int kLaunched = [] {
    if constexpr (requires { requires Kernel::Cores::kLoader; }) return Kernel::Cores::kLaunched;
    else return Kernel::kThreads;
}();

template <class Kernel>
__global__ void __launch_bounds__(kLaunched<Kernel>, blocks_at_once<Kernel>())
    run(const __grid_constant__ Kernel kernel) {
    if constexpr (kHasWgmma || !kNeedsWgmma<Kernel>) {  // the others are never launched here
        extern __shared__ __align__(1024) unsigned char memory[];
        DeviceBlock block = {int64_t(blockIdx.x)};
        kernel(block, *reinterpret_cast<typename Kernel::Shared*>(memory));
    }
}

// One of the device that is current. Nothing here waits for it.
class Stream {
public:
    explicit Stream(cudaStream_t stream) : stream_(stream) {}

    template <class Kernel>
    void launch(const Kernel& kernel) const {
        const int64_t blocks = kernel.blocks();
        if (blocks == 0) return;
        STD_TORCH_CHECK(blocks <= INT32_MAX, "vqops: the input is too large, it takes ", blocks, " blocks");
        const size_t shared = kernel.shared_bytes();
        if (shared > 48 * 1024)
            check(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "vqops");
        run<Kernel><<<unsigned(blocks), kLaunched<Kernel>, shared, stream_>>>(kernel);
        check(cudaGetLastError(), "vqops");
    }

    void sort(const RowsByCode& sorted) const;  // sort.cu
    void fill(void* data, int byte, int64_t bytes) const {
        check(cudaMemsetAsync(data, byte, size_t(bytes), stream_), "vqops");
    }

private:
    cudaStream_t stream_;
};

size_t sort_bytes(int64_t rows, int64_t codes);  // sort.cu

}  // namespace vqops::cuda
