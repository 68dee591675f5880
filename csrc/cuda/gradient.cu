#include "gradient.h"

#include "gpu.h"

namespace vqops::cuda {
namespace {

Passing passing_of(const std::string& gradient) {
    return gradient == "rotation" ? Passing::rotation
                                  : gradient == "straight_through" ? Passing::straight_through : Passing::none;
}

template <class T, class Real>
void run_gradient(const Gpu& gpu, const GradientInputs<T, Real>& in, const Tensor& grad_x, const Tensor& grad_codebook,
                  int64_t K) {
    const char* op = "quantize_backward";
    if (grad_x.numel()) gradient_of_rows(gpu, in, static_cast<T*>(grad_x.mutable_data_ptr()), static_cast<Real*>(nullptr));
    if (!grad_codebook.numel()) return;
    const SumsWork<Real> work(gpu, op, in.H, in.N, K, in.D, in.cosine ? in.H * in.N : 0);
    gradient_of_codes(gpu, in, work.sorted, sums_out(work, in.D, grad_codebook, nullptr), work.inverse);
}

}  // namespace

std::tuple<Tensor, Tensor> quantize_backward(OptionalTensor grad_quantized, OptionalTensor grad_error, const Tensor& x,
                                             const Tensor& codebook, const Tensor& indices, OptionalTensor mask,
                                             std::string metric, std::string gradient, double codebook_error_scale,
                                             bool x_needed, bool codebook_needed) {
    const char* op = "quantize_backward";
    const bool cosine = is_cosine(op, metric);
    check_search_arguments(op, x, codebook, mask);
    const int64_t H = x.size(0), N = x.size(1), D = x.size(2), K = codebook.size(1);
    STD_TORCH_CHECK(H * N < INT32_MAX, op, ": x may have up to 2^31 rows");
    const Gpu gpu(x);
    Tensor grad_x = x_needed ? torch::stable::new_empty(x, x.sizes()) : unused(x, x.scalar_type());
    Tensor grad_codebook =
        codebook_needed ? torch::stable::new_empty(codebook, codebook.sizes()) : unused(codebook, codebook.scalar_type());
    if (codebook_needed && !grad_error) torch::stable::zero_(grad_codebook);
    // quantized has x's dtype, and so has its gradient, unless a caller of this op gives another.
    const OptionalTensor g = grad_quantized && grad_quantized->scalar_type() != x.scalar_type()
                                 ? OptionalTensor(torch::stable::to(*grad_quantized, x.scalar_type()))
                                 : grad_quantized;
    const Rows rows = rows_of(op, x), codes = rows_of(op, codebook), passed = g ? rows_of(op, *g) : Rows{};
    const Rows errors = grad_error ? rows_of(op, *grad_error) : Rows{};
    const Tensor none = unused(codebook, codebook.scalar_type());
    const bool wide = rows.dtype == DType::float64 || codes.dtype == DType::float64;
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        const auto run = [&](auto real) {
            using Real = decltype(real);
            const GradientInputs<T, Real> in = {H, N, D, rows.as<T>(), passed.as<T>(), errors, codes,
                                                indices_of(op, indices, x, K), mask_of(mask), passing_of(gradient),
                                                cosine, codebook_error_scale};
            run_gradient(gpu, in, grad_x, grad_error ? grad_codebook : none, K);
        };
        if (wide) run(double());
        else if constexpr (!std::is_same_v<T, double>) run(float());
    });
    return {grad_x, grad_codebook};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_KERNEL(quantize_backward); }
