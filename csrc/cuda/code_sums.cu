#include "code_sums.h"

#include "gpu.h"

namespace vqops::cuda {

template <bool sorted>
std::tuple<Tensor, Tensor> code_sums(const Tensor& x, const Tensor& indices, int64_t K, OptionalTensor weight) {
    const char* op = "code_sums";
    STD_TORCH_CHECK(x.dim() == 3 && K > 0, op, ": x must be [H, N, D] and num_codes at least 1");
    STD_TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == x.size(0) && weight->size(1) == x.size(1)), op,
                    ": weight must be [H, N]");
    const int64_t H = x.size(0), D = x.size(2);
    const Gpu gpu(x);
    Tensor counts = torch::stable::new_empty(x, {H, K}, weight ? ScalarType::Float : ScalarType::Long);
    Tensor sums = torch::stable::new_empty(x, {H, K, D}, ScalarType::Float);
    const SumsWork<float> work(gpu, rows_by_code(op, indices, x, K), sorted, sums, &counts);
    const Rows rows = rows_of(op, x), weights = weight ? rows_of(op, *weight) : Rows{};
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        code_sums(gpu, rows.as<T>(), weights, work.out);
    });
    return {counts, sums};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_SUMS(code_sums); }
