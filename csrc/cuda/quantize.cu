#include "finalize.h"

#include "search_ops.h"

namespace vqops::cuda {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize(
    const Tensor& x, const Tensor& codebook, OptionalTensor mask, OptionalTensor weight, std::string metric,
    std::string, bool with_sums, double, bool snapshot, OptionalTensor prepared) {
    const char* op = "quantize";
    const Tensor indices = nearest(x, codebook, mask, metric, prepared);
    const int64_t H = x.size(0), N = x.size(1), D = x.size(2), K = codebook.size(1);
    STD_TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == H && weight->size(1) == N), op,
                    ": weight must be [H, N]");
    STD_TORCH_CHECK(H * N < INT32_MAX, op, ": x may have up to 2^31 rows");
    const Gpu gpu(x);
    const bool weighted = with_sums && weight;
    Tensor quantized = torch::stable::new_empty(x, x.sizes());
    Tensor error = torch::stable::new_empty(x, {H, N}, real_type(x));
    const ScalarType counted = weighted ? ScalarType::Float : ScalarType::Long;
    Tensor counts = with_sums ? torch::stable::new_empty(x, {H, K}, counted) : unused(x, counted);
    Tensor sums = with_sums ? torch::stable::new_empty(x, {H, K, D}, ScalarType::Float) : unused(x, ScalarType::Float);
    std::optional<SumsWork<float>> work;
    if (with_sums) work.emplace(gpu, op, H, N, K, D + weighted);
    const Rows rows = rows_of(op, x), weights = weighted ? rows_of(op, *weight) : Rows{};
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        using Real = typename ErrorOf<T>::type;
        finalize(gpu, Finalize<T>{H, N, D, rows.as<T>(), rows_of(op, codebook), weights, indices_of(op, indices, x, K),
                                  mask_of(mask), metric == "cosine", with_sums,
                                  static_cast<T*>(quantized.mutable_data_ptr()),
                                  static_cast<Real*>(error.mutable_data_ptr()), work ? work->sorted : Sorted{},
                                  work ? sums_out(*work, D, sums, &counts) : SumsOut<float>{}});
    });
    Tensor old = torch::stable::new_empty(codebook, snapshot ? codebook.sizes() : torch::headeronly::IntHeaderOnlyArrayRef({0}));
    if (snapshot) torch::stable::copy_(old, codebook);
    return {quantized, indices, error, counts, sums, old};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_KERNEL(quantize); }
