#include "quantize_backward.h"

#include "gpu.h"

namespace vqops::cuda {
namespace {

template <class T, class Real>
void run_gradient(const Gpu& gpu, const BackwardInputs<T, Real>& in, const RowsByCode& by_code, bool sorted,
                  const Tensor& grad_x, Tensor& grad_codebook) {
    Real* const no_norms = nullptr;
    if (grad_x.numel()) gradient_of_rows(gpu, in, static_cast<T*>(grad_x.mutable_data_ptr()), no_norms);
    if (!grad_codebook.numel()) return;
    const Tensor norms = gpu.allocate(in.units ? in.H * in.N * int64_t(sizeof(Real)) : 0);
    // Atomic operations add in Real alone: a sum kept in float16 would lose what it is made of.
    const ScalarType real = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
    const bool converts = !sorted && grad_codebook.scalar_type() != real;
    const Tensor sums = converts ? torch::stable::new_empty(grad_codebook, grad_codebook.sizes(), real) : grad_codebook;
    const SumsWork<Real> work(gpu, by_code, sorted, sums, nullptr);
    gradient_of_codes(gpu, in, work.out, static_cast<Real*>(norms.mutable_data_ptr()));
    if (converts) torch::stable::copy_(grad_codebook, sums);
}

}  // namespace

template <bool sorted>
std::tuple<Tensor, Tensor> quantize_backward(OptionalTensor grad_quantized, OptionalTensor grad_error, const Tensor& x,
                                             const Tensor& codebook, const Tensor& indices, OptionalTensor mask,
                                             std::string metric, std::string gradient, double codebook_error_scale,
                                             bool normalize, bool x_needed, bool codebook_needed) {
    const char* op = "quantize_backward";
    const bool units = is_cosine(op, metric) && normalize;
    check_search_arguments(op, x, codebook, mask);
    const RowsByCode by_code = rows_by_code(op, indices, x, codebook.size(1));
    const Gpu gpu(x);
    Tensor grad_x = new_or_unused(x, x_needed), grad_codebook = new_or_unused(codebook, codebook_needed);
    if (codebook_needed && !grad_error) torch::stable::zero_(grad_codebook);
    // quantized has x's dtype, and so has its gradient, unless a caller of this op gives another.
    const OptionalTensor g = grad_quantized && grad_quantized->scalar_type() != x.scalar_type()
                                 ? OptionalTensor(torch::stable::to(*grad_quantized, x.scalar_type()))
                                 : grad_quantized;
    const Rows rows = rows_of(op, x), codes = rows_of(op, codebook), passed = g ? rows_of(op, *g) : Rows{};
    const Rows errors = grad_error ? rows_of(op, *grad_error) : Rows{};
    Tensor none = unused(codebook, codebook.scalar_type());
    const bool wide = rows.dtype == DType::float64 || codes.dtype == DType::float64;
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        const auto run = [&](auto real) {
            using Real = decltype(real);
            const BackwardInputs<T, Real> in = {by_code.H, by_code.N, x.size(2), rows.as<T>(), passed.as<T>(), errors,
                                                codes, by_code.indices, mask_of(mask), passing_of(gradient), units,
                                                codebook_error_scale};
            run_gradient(gpu, in, by_code, sorted, grad_x, grad_error ? grad_codebook : none);
        };
        if (wide) run(double());
        else if constexpr (!std::is_same_v<T, double>) run(float());
    });
    return {grad_x, grad_codebook};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_SUMS(quantize_backward); }
