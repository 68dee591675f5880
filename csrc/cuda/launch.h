// Launches on a stream of a GPU. Nothing of tensors: units of kernels alone do without torch's stable headers, of which
// nvcc makes ten seconds.
#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <vector>

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
    if constexpr (requires { Kernel::kBlocksAtOnce; }) return Kernel::kBlocksAtOnce;
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

// Limits of a GPU.
struct Limits {
    int shared_bytes;  // that a block may have
    int major, minor, multiprocessors;
};

// Asked of the driver once in a process: every search needs them.
inline const Limits& limits_of(int device) {
    static const std::vector<Limits> all = [] {
        int devices = 0;
        check(cudaGetDeviceCount(&devices), "vqops");
        std::vector<Limits> found(devices);
        for (int i = 0; i < devices; i++) {
            const auto ask = [&](int& value, cudaDeviceAttr what) {
                check(cudaDeviceGetAttribute(&value, what, i), "vqops");
            };
            ask(found[i].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
            ask(found[i].major, cudaDevAttrComputeCapabilityMajor);
            ask(found[i].minor, cudaDevAttrComputeCapabilityMinor);
            ask(found[i].multiprocessors, cudaDevAttrMultiProcessorCount);
        }
        return found;
    }();
    return all.at(size_t(device));
}

// The devices, a bit for each of the first 64, on which a kernel may have all the shared memory. A unit's own, as nvcc
// makes `run` one of each unit.
template <class Kernel>
static std::atomic<uint64_t> allowed{0};

// One of the device, which is current. Nothing here waits for it.
class Stream {
public:
    Stream(cudaStream_t stream, int device) : stream_(stream), device_(device) {}

    template <class Kernel>
    void launch(const Kernel& kernel) const {
        const int64_t blocks = kernel.blocks();
        if (blocks == 0) return;
        STD_TORCH_CHECK(blocks <= INT32_MAX, "vqops: the input is too large, it takes ", blocks, " blocks");
        const size_t shared = kernel.shared_bytes();
        if (shared > kFewShared) {
            allow_shared(reinterpret_cast<const void*>(run<Kernel>), allowed<Kernel>);
        }
        run<Kernel><<<unsigned(blocks), kLaunched<Kernel>, shared, stream_>>>(kernel);
        check(cudaGetLastError(), "vqops");
    }

    void sort(const RowsByCode& sorted) const;  // sort.cu
    void fill(void* data, int byte, int64_t bytes) const {
        check(cudaMemsetAsync(data, byte, size_t(bytes), stream_), "vqops");
    }

private:
    static constexpr size_t kFewShared = 16 * 1024;  // several such blocks fit whatever an SM keeps as a cache

    // All the shared memory that there is, of a block and of an SM, which else keeps some as a cache where a second
    // block would fit. Once for a kernel and device: each of these calls takes the host as long as part of a launch.
    void allow_shared(const void* kernel, std::atomic<uint64_t>& devices) const {
        const uint64_t own = device_ < 64 ? uint64_t(1) << device_ : 0;
        if (devices.load(std::memory_order_acquire) & own) return;
        const auto set = [&](cudaFuncAttribute what, int value) {
            check(cudaFuncSetAttribute(kernel, what, value), "vqops");
        };
        set(cudaFuncAttributeMaxDynamicSharedMemorySize, limits_of(device_).shared_bytes);
        set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
        devices.fetch_or(own, std::memory_order_release);
    }

    cudaStream_t stream_;
    int device_;
};

size_t sort_bytes(int64_t rows, int64_t codes);  // sort.cu

}  // namespace vqops::cuda
