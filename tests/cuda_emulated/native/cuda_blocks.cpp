// The bodies of the CUDA kernels on the CPU, but those of the search (cuda_search.cpp), for cuda_blocks.py.

#include "../../../csrc/cuda/code_sums.h"
#include "../../../csrc/cuda/ema.h"
#include "../../../csrc/cuda/gather.h"
#include "../../../csrc/cuda/quantize_backward.h"
#include "emulator.h"

using namespace vqops;
using namespace vqops::cuda;

namespace {

// Sums by code; those in the sorted order with a workspace, poisoned.
template <class T>
struct Space {
    Space(const RowsByCode& by_code, bool sorted, int64_t D, int64_t columns, void* sums, DType dtype, Count* counts,
          float* weights)
        : out{by_code, D, columns, sums, dtype, counts, weights, nullptr} {
        if (!sorted) return;
        Memory dry;
        take(dry);
        data.assign(dry.size / 4, 0x7fc0dead);
        Memory memory(data.data());
        take(memory);
    }
    void take(Memory& memory) {
        out.by_code.take(memory, 0);
        out.partial = memory.take<T>(out.by_code.slots() * out.columns);
    }
    Sums<T> out;
    std::vector<uint32_t> data;
};

}  // namespace

// `sorted`: the order of the reference, else that of atomic operations, whose number is returned.
EXPORT int64_t code_sums(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                         const Rows* weight, const Indices* indices, float* sums, Count* counts, float* weights) {
    const int64_t columns = D + (weight->data ? 1 : 0);
    const Space<float> space({H, N, K, *indices}, sorted, D, columns, sums, DType::float32, counts, weights);
    int64_t additions = 0;
    const Emulator device = {descending != 0, 16, &additions};
    with_type(x->dtype, [&](auto zero) { code_sums(device, x->as<decltype(zero)>(), *weight, space.out); });
    return additions;
}

EXPORT void gather(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                   const Rows* codebook, const Rows* weight, const Indices* indices, const RowMask* mask, int units,
                   int with_sums, void* quantized, void* error, float* sums, Count* counts, float* weights) {
    const int64_t columns = D + (weight->data ? 1 : 0);
    const RowsByCode by_code = {H, N, K, *indices};
    const Space<float> space(by_code, sorted, D, columns, sums, DType::float32, counts, weights);
    const Emulator device = {descending != 0};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        using Real = typename ErrorOf<T>::type;
        gather(device,
               GatherInputs<T>{D, x->as<T>(), *codebook, *weight, *mask, units != 0, static_cast<T*>(quantized),
                               static_cast<Real*>(error), with_sums ? space.out : Sums<float>{by_code}},
               with_sums);
    });
}

EXPORT void ema_update(int descending, const EmaState* state) {
    Emulator device = {descending != 0};
    ema_update(device, *state);
}

// grad_codebook has the codebook's dtype in the sorted order, else that of the sums: float64 if x or the codebook has.
EXPORT void quantize_backward(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D,
                              const Rows* quantized, const Rows* error, const Rows* x, const Rows* codebook,
                              const Indices* indices, const RowMask* mask, int units, int passing, double scale,
                              void* grad_x, void* grad_codebook) {
    Emulator device = {descending != 0};
    const bool wide = x->dtype == DType::float64 || codebook->dtype == DType::float64;
    const auto run = [&](auto typed, auto reals) {
        using T = decltype(typed);
        using Real = decltype(reals);
        const BackwardInputs<T, Real> in = {H, N, D, x->as<T>(), quantized->as<T>(), *error, *codebook, *indices,
                                            *mask, Passing(passing), units != 0, scale};
        if (grad_x) gradient_of_rows(device, in, static_cast<T*>(grad_x), static_cast<Real*>(nullptr));
        if (!grad_codebook) return;
        const DType dtype = sorted ? codebook->dtype : wide ? DType::float64 : DType::float32;
        const Space<Real> space({H, N, K, *indices}, sorted, D, D, grad_codebook, dtype, nullptr, nullptr);
        std::vector<Real> inverse(H * N, NAN);
        gradient_of_codes(device, in, space.out, inverse.data());
    };
    with_type(x->dtype, [&](auto typed) {
        if (wide) run(typed, double());
        else run(typed, float());
    });
}
