#include "residual_backward.h"

#include "levels.h"

namespace vqops::cuda {
namespace {

template <class Real, class T>
void gradient_of_x(const Gpu& gpu, const LevelsInputs<T>& in, const Tensor& grad_x) {
    OptionalTensor memory;
    gradient_of_levels<Real>(gpu, in, static_cast<T*>(grad_x.mutable_data_ptr()), [&](size_t bytes) {
        memory = gpu.allocate(int64_t(bytes));
        return static_cast<char*>(memory->mutable_data_ptr());
    });
}

// Of all levels, one after another. in.x is what the first one takes.
template <class Real, class Rest>
void gradient_of_codebooks(const Gpu& gpu, const LevelsInputs<Rest>& in, double scale, bool sorted,
                           const Tensor& grad_codebooks) {
    const ScalarType real = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
    const ScalarType type = sorted ? grad_codebooks.scalar_type() : real;  // of atomic additions it is Real alone
    const Tensor inverse = gpu.allocate(in.units ? in.H * in.N * int64_t(sizeof(Real)) : 0);
    const Tensor rest = gpu.allocate(in.Q > 1 ? in.H * in.N * in.D * int64_t(sizeof(Rest)) : 0);
    for (int64_t l = 0; l < in.Q; l++) {
        const int64_t K = in.first[l + 1] - in.first[l];
        LevelPart part(grad_codebooks, in.first[l], K, type);
        const SumsWork<Real> work(gpu, {in.H, in.N, K, in.of_level(l)}, sorted, part.tensor(), nullptr);
        gradient_of_level(gpu, in, l, scale, work.out, static_cast<Real*>(inverse.mutable_data_ptr()),
                          static_cast<Rest*>(rest.mutable_data_ptr()));
        part.give();
    }
}

}  // namespace

template <bool sorted>
std::tuple<Tensor, Tensor> residual_quantize_backward(
    OptionalTensor grad_quantized, OptionalTensor grad_error, const Tensor& x, const Tensor& codebooks,
    std::vector<int64_t> sizes, const Tensor& given, OptionalTensor mask, OptionalTensor levels, std::string metric,
    std::string passing, bool per_level, double codebook_error_scale, bool normalize, bool x_needed,
    bool codebooks_needed) {
    const char* op = "residual_quantize_backward";
    const bool units = is_cosine(op, metric) && normalize;
    check_search_arguments(op, x, codebooks, mask);
    check_level_gradients(op, grad_quantized, grad_error, x, codebooks, sizes, given);
    const Tensor indices = torch::stable::contiguous(given);
    const int64_t H = x.size(0), N = x.size(1), D = x.size(2), Q = int64_t(sizes.size());
    STD_TORCH_CHECK(Q <= kMostLevels, op, ": there may be up to ", kMostLevels, " levels, got ", Q);
    STD_TORCH_CHECK(H * N < INT32_MAX && H * codebooks.size(1) < INT32_MAX, op,
                    ": x may have up to 2^31 rows, and as many codes");
    const Gpu gpu(x);
    Tensor grad_x = new_or_unused(x, x_needed), grad_codebooks = new_or_unused(codebooks, codebooks_needed);
    if (codebooks_needed && !grad_error) torch::stable::zero_(grad_codebooks);
    // quantized has x's dtype, and so has its gradient, unless a caller of this op gives another.
    const OptionalTensor g = grad_quantized && grad_quantized->scalar_type() != x.scalar_type()
                                 ? OptionalTensor(torch::stable::to(*grad_quantized, x.scalar_type()))
                                 : grad_quantized;
    const Rows passed = g ? rows_of(op, *g) : Rows{}, codes = rows_of(op, codebooks);
    const Rows errors = grad_error ? rows_of(op, *grad_error) : Rows{};
    const Running running = {running_levels(op, levels)};
    const auto inputs = [&](auto typed, const Rows& rows, const Rows& quantized) {
        using T = decltype(typed);
        LevelsInputs<T> in = {H, N, D, Q, rows.as<T>(), quantized.as<T>(), errors, codes, {},
                              static_cast<const int64_t*>(indices.const_data_ptr()), mask_of(mask), running,
                              passing_of(passing), per_level, units};
        std::partial_sum(sizes.begin(), sizes.end(), in.first + 1);
        return in;
    };
    const auto with_real = [&](auto rest, const auto& body) {  // of all values: float64 if x or the codebooks have it
        if (std::is_same_v<decltype(rest), double> || codes.dtype == DType::float64) body(double());
        else if constexpr (std::is_same_v<decltype(rest), float>) body(float());
    };
    const Rows rows = rows_of(op, x);
    if (x_needed)
        with_type(rows.dtype, [&](auto typed) {
            with_real(typename ErrorOf<decltype(typed)>::type(), [&](auto real) {
                gradient_of_x<decltype(real)>(gpu, inputs(typed, rows, passed), grad_x);
            });
        });
    if (codebooks_needed && grad_error) {
        const ScalarType real = real_type(x);
        const Tensor first = x.scalar_type() == real ? x : torch::stable::to(x, real);
        const auto run = [&](auto rest) {
            with_real(rest, [&](auto real) {
                gradient_of_codebooks<decltype(real)>(gpu, inputs(rest, rows_of(op, first), Rows{}),
                                                      codebook_error_scale, sorted, grad_codebooks);
            });
        };
        if (real == ScalarType::Double) run(double());
        else run(float());
    }
    return {grad_x, grad_codebooks};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_SUMS(residual_quantize_backward); }
