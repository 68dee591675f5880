// The bodies of the CUDA kernels on the CPU, but those of the search (cuda_search.cpp), for cuda_blocks.py.

#include "../../../csrc/cuda/code_sums.h"
#include "../../../csrc/cuda/ema.h"
#include "../../../csrc/cuda/gather.h"
#include "../../../csrc/cuda/quantize_backward.h"
#include "../../../csrc/cuda/residual.h"
#include "../../../csrc/cuda/residual_backward.h"
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

// Before the first level of residual quantization; `square` null without units, `kept` without `levels`.
EXPORT void first_level(int descending, int64_t H, int64_t N, int64_t D, const Rows* x, const RowMask* mask,
                        const int64_t* levels, double* square, bool* kept) {
    const Emulator device = {descending != 0};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        device.launch(FirstLevel<T>{{H, N}, D, x->as<T>(), *mask, {levels}, {square, kept}});
    });
}

EXPORT void take_off(int descending, int64_t H, int64_t N, int64_t D, int64_t Q, int64_t level, const Rows* x,
                     const Rows* codebook, const Indices* chosen, const RowMask* mask, const int64_t* levels,
                     void* rest, void* total, void* quantized, int64_t* indices, double* error, double* square,
                     bool* kept) {
    const Emulator device = {descending != 0};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        using Real = typename ErrorOf<T>::type;
        device.launch(TakeOff<T>{{H, N}, D, Q, level, x->as<T>(), *codebook, *chosen, *mask, {levels},
                                 static_cast<Real*>(rest), static_cast<Real*>(total), static_cast<T*>(quantized),
                                 indices, error, {square, kept}});
    });
}

EXPORT void add_errors(int descending, int64_t groups, int64_t N, const double* errors, void* sums, int dtype) {
    const Emulator device = {descending != 0};
    std::vector<double> partial(groups * runs_of(N), NAN);
    add_errors(device, errors, groups, N, partial.data(), sums, DType(dtype));
}

EXPORT void sum_level(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                      const double* square, const Indices* chosen, float* sums, Count* counts) {
    const Space<float> space({H, N, K, *chosen}, sorted, D, D, sums, DType::float32, counts, nullptr);
    const Emulator device = {descending != 0};
    with_type(x->dtype, [&](auto zero) { sum_level(device, x->as<decltype(zero)>(), square, space.out); });
}

namespace {

// `sizes` and pointers as residual_quantize_backward has them.
struct Levels {
    int64_t H, N, D, Q;
    const int64_t *sizes, *indices, *levels;
    int passing, per_level, units;
};

template <class T>
LevelsInputs<T> inputs_of(const Levels& all, const Rows& x, const Rows& quantized, const Rows& error,
                          const Rows& codebooks, const RowMask& mask) {
    LevelsInputs<T> in = {all.H, all.N, all.D, all.Q, x.as<T>(), quantized.as<T>(), error, codebooks, {}, all.indices,
                          mask, {all.levels}, Passing(all.passing), all.per_level != 0, all.units != 0};
    std::partial_sum(all.sizes, all.sizes + all.Q, in.first + 1);
    return in;
}

}  // namespace

EXPORT void gradient_of_levels(int descending, const Levels* levels, const Rows* quantized, const Rows* error,
                               const Rows* x, const Rows* codebooks, const RowMask* mask, void* grad_x) {
    const Emulator device = {descending != 0};
    std::vector<float> memory;
    const auto allocate = [&](size_t bytes) {
        memory.assign(bytes / sizeof(float), NAN);
        return reinterpret_cast<char*>(memory.data());
    };
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto in = inputs_of<T>(*levels, *x, *quantized, *error, *codebooks, *mask);
        if (x->dtype == DType::float64 || codebooks->dtype == DType::float64)
            gradient_of_levels<double>(device, in, static_cast<T*>(grad_x), allocate);
        else if constexpr (!std::is_same_v<T, double>)
            gradient_of_levels<float>(device, in, static_cast<T*>(grad_x), allocate);
    });
}

// x is float32 or float64; grad_codebook as in quantize_backward.
EXPORT void gradient_of_level(int descending, int sorted, const Levels* levels, int64_t level, double scale,
                              const Rows* error, const Rows* x, const Rows* codebooks, const RowMask* mask, void* rest,
                              void* grad_codebook) {
    const Emulator device = {descending != 0};
    const bool wide = x->dtype == DType::float64 || codebooks->dtype == DType::float64;
    const auto run = [&](auto left, auto reals) {
        using Rest = decltype(left);
        using Real = decltype(reals);
        const auto in = inputs_of<Rest>(*levels, *x, {}, *error, *codebooks, *mask);
        const DType dtype = sorted ? codebooks->dtype : wide ? DType::float64 : DType::float32;
        const Space<Real> space({in.H, in.N, levels->sizes[level], in.of_level(level)}, sorted, in.D, in.D,
                                grad_codebook, dtype, nullptr, nullptr);
        std::vector<Real> inverse(in.H * in.N, NAN);
        gradient_of_level(device, in, level, scale, space.out, inverse.data(), static_cast<Rest*>(rest));
    };
    if (x->dtype == DType::float64) run(double(), double());
    else if (wide) run(float(), double());
    else run(float(), float());
}
