// Launches on a GPU, and workspace.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "../bindings.h"
#include "block.h"
#include "memory.h"
#include "code_sums.h"

// Torch's shim of its CUDA half, which a torch without CUDA does not have: weak, so that the kernels load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vqops::cuda {

inline void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

template <class Kernel>
constexpr bool kNeedsWgmma = requires { requires Kernel::Cores::kWarpgroups; };

// Blocks of an SM that registers must suffice for; 0: the compiler's choice, which spills where many seem to fit.
template <class Kernel>
constexpr int kBlocksAtOnce = requires { requires Kernel::kAllRegisters; } ? 1 : 0;

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, kBlocksAtOnce<Kernel>) run(const __grid_constant__ Kernel kernel) {
    if constexpr (kHasWgmma || !kNeedsWgmma<Kernel>) {  // the others are never launched here
        extern __shared__ __align__(1024) unsigned char memory[];
        DeviceBlock block = {int64_t(blockIdx.x)};
        kernel(block, *reinterpret_cast<typename Kernel::Shared*>(memory));
    }
}

// Runs on the device of `on` and its current stream, without a synchronisation.
class Gpu {
public:
    explicit Gpu(const Tensor& on) : guard_(on.get_device_index()), on_(on) {
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "vqops: this torch has no CUDA");
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream) == 0,
                        "vqops: torch has no current stream");
        stream_ = static_cast<cudaStream_t>(stream);
    }

    template <class Kernel>
    void launch(const Kernel& kernel) const {
        const int64_t blocks = kernel.blocks();
        if (blocks == 0) return;
        STD_TORCH_CHECK(blocks <= INT32_MAX, "vqops: the input is too large, it takes ", blocks, " blocks");
        const size_t shared = kernel.shared_bytes();
        if (shared > 48 * 1024)
            check(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "vqops");
        run<Kernel><<<unsigned(blocks), Kernel::kThreads, shared, stream_>>>(kernel);
        check(cudaGetLastError(), "vqops");
    }

    void sort(const RowsByCode& sorted) const;  // sort.cu
    void fill(void* data, int byte, int64_t bytes) const {
        check(cudaMemsetAsync(data, byte, size_t(bytes), stream_), "vqops");
    }

    // Workspace that torch takes back when the stream is done with it.
    Tensor allocate(int64_t bytes) const { return torch::stable::new_empty(on_, {bytes}, ScalarType::Byte); }

private:
    torch::stable::accelerator::DeviceGuard guard_;
    const Tensor& on_;
    cudaStream_t stream_ = nullptr;
};

size_t sort_bytes(int64_t rows, int64_t codes);  // sort.cu

// Rows by their codes, for kernels that index rows and codes of all heads by 32 bits. Indices that are no code count as
// -1; Python has asserted on the device that there are none.
inline RowsByCode rows_by_code(const char* op, const Tensor& indices, const Tensor& x, int64_t K) {
    const int64_t H = x.size(0), N = x.size(1);
    STD_TORCH_CHECK(H * N < INT32_MAX && H * K < INT32_MAX, op, ": x may have up to 2^31 rows, and as many codes");
    return {H, N, K, indices_of(op, indices, x, K)};
}

// Sums by code, with the workspace of the sorted order if they are to have it. `sums` is [H, K, D]; `counts` int64, or
// float32 for weights, or null where nobody counts.
template <class T>
class SumsWork {
public:
    SumsWork(const Gpu& gpu, const RowsByCode& by_code, bool sorted, const Tensor& sums, const Tensor* counts) {
        const bool weighted = counts && counts->scalar_type() == ScalarType::Float;
        const int64_t D = sums.size(2);
        out = {by_code,
               D,
               D + weighted,
               sums.mutable_data_ptr(),
               dtype_of("sums", sums),
               counts && !weighted ? static_cast<Count*>(counts->mutable_data_ptr()) : nullptr,
               weighted ? static_cast<float*>(counts->mutable_data_ptr()) : nullptr,
               nullptr};
        if (!sorted) return;
        const size_t of_sort = sort_bytes(by_code.rows(), by_code.codes());
        Memory dry;
        take(dry, of_sort);
        memory_ = gpu.allocate(dry.size);
        Memory memory(memory_->mutable_data_ptr());
        take(memory, of_sort);
    }
    Sums<T> out;

private:
    void take(Memory& memory, size_t of_sort) {
        out.by_code.take(memory, of_sort);
        out.partial = memory.take<T>(out.by_code.slots() * out.columns);
    }
    OptionalTensor memory_;
};

}  // namespace vqops::cuda

// An op of its own only: what the plain op runs on CUDA is decided by measurements, and there are none.
#define VQOPS_CUDA_KERNEL(name) m.impl(#name "_compiled", TORCH_BOX(&vqops::cuda::name))

// Of an op that sums by code there are two, between which vqops/dispatch/library.py chooses at each call: the stable ABI
// does not tell whether torch.use_deterministic_algorithms is on.
#define VQOPS_CUDA_SUMS(name)                                               \
    m.impl(#name "_compiled_atomic", TORCH_BOX(&vqops::cuda::name<false>)); \
    m.impl(#name "_compiled_sorted", TORCH_BOX(&vqops::cuda::name<true>))
