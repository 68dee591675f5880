#include "gather.h"

#include "search_ops.h"

namespace vqops::cuda {

template <bool sorted>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize(
    const Tensor& x, const Tensor& codebook, OptionalTensor mask, OptionalTensor weight, std::string metric,
    std::string, bool with_sums, double, bool normalize, bool snapshot, OptionalTensor prepared) {
    const char* op = "quantize";
    const Tensor indices = nearest(x, codebook, mask, metric, prepared);
    const int64_t H = x.size(0), N = x.size(1), D = x.size(2), K = codebook.size(1);
    STD_TORCH_CHECK(!weight || (weight->dim() == 2 && weight->size(0) == H && weight->size(1) == N), op,
                    ": weight must be [H, N]");
    const RowsByCode by_code = rows_by_code(op, indices, x, K);
    const Gpu gpu(x);
    const bool weighted = with_sums && weight;
    Tensor quantized = torch::stable::new_empty(x, x.sizes());
    Tensor error = torch::stable::new_empty(x, {H, N}, real_type(x));
    const ScalarType counted = weighted ? ScalarType::Float : ScalarType::Long;
    Tensor counts = with_sums ? torch::stable::new_empty(x, {H, K}, counted) : unused(x, counted);
    Tensor sums = with_sums ? torch::stable::new_empty(x, {H, K, D}, ScalarType::Float) : unused(x, ScalarType::Float);
    std::optional<SumsWork<float>> work;
    if (with_sums) work.emplace(gpu, by_code, sorted, sums, &counts);
    const Rows rows = rows_of(op, x), weights = weighted ? rows_of(op, *weight) : Rows{};
    with_type(rows.dtype, [&](auto typed) {
        using T = decltype(typed);
        using Real = typename ErrorOf<T>::type;
        gather(gpu,
               GatherInputs<T>{D, rows.as<T>(), rows_of(op, codebook), weights, mask_of(mask),
                               metric == "cosine" && normalize, static_cast<T*>(quantized.mutable_data_ptr()),
                               static_cast<Real*>(error.mutable_data_ptr()),
                               work ? work->out : Sums<float>{by_code}},
               with_sums);
    });
    return {quantized, indices, error, counts, sums, snapshot_of(codebook, snapshot)};
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_SUMS(quantize); }
