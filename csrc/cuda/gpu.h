// The GPU of a tensor, its stream of torch, and workspace.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../bindings.h"
#include "code_sums.h"
#include "launch.h"
#include "memory.h"

// Torch's shim of its CUDA half, which a torch without CUDA does not have: weak, so that the kernels load there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace vqops::cuda {

inline cudaStream_t current_stream(int32_t device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "vqops: this torch has no CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "vqops: torch has no current stream");
    return static_cast<cudaStream_t>(stream);
}

// Runs on the device of `on` and its current stream.
class Gpu : public Stream {
public:
    explicit Gpu(const Tensor& on)
        : Stream(current_stream(on.get_device_index()), on.get_device_index()),
          guard_(on.get_device_index()),
          on_(on) {
        // This runtime is linked statically, and may take another device for current than torch's, which the guard set.
        // Nothing is set back: the thread's context is the guard's matter, and the next Gpu looks again.
        int current = -1;
        check(cudaGetDevice(&current), "vqops");
        if (current != on.get_device_index()) check(cudaSetDevice(on.get_device_index()), "vqops");
    }

    // Workspace that torch takes back when the stream is done with it.
    Tensor allocate(int64_t bytes) const { return torch::stable::new_empty(on_, {bytes}, ScalarType::Byte); }

private:
    torch::stable::accelerator::DeviceGuard guard_;
    const Tensor& on_;
};

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
