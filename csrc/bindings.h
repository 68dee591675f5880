// Arguments of the ops, checked, as the kernels of both devices take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "contract.h"
#include "tensors.h"

namespace vqops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Callers get readable errors from Python; these keep a kernel from reading what is not there.
inline void check_search_arguments(const char* op, const Tensor& x, const Tensor& codebook,
                                   const OptionalTensor& mask) {
    STD_TORCH_CHECK(x.dim() == 3 && codebook.dim() == 3, op, ": x must be [H, N, D] and codebook [H, K, D]");
    STD_TORCH_CHECK(x.size(0) == codebook.size(0) && x.size(2) == codebook.size(2), op,
                    ": codebook has H=", codebook.size(0), " and D=", codebook.size(2), ", x has H=", x.size(0),
                    " and D=", x.size(2));
    STD_TORCH_CHECK(codebook.size(1) > 0 && codebook.size(2) > 0, op, ": codebook must have a code and a dimension");
    STD_TORCH_CHECK(codebook.size(1) <= INT32_MAX, op, ": codebook must have fewer than 2^31 codes");
    STD_TORCH_CHECK(!mask || (mask->dim() == 2 && mask->size(0) == x.size(0) && mask->size(1) == x.size(1) &&
                              mask->scalar_type() == ScalarType::Bool),
                    op, ": mask must be bool [H, N]");
}

inline bool is_cosine(const char* op, const std::string& metric) {
    STD_TORCH_CHECK(metric == "euclidean" || metric == "cosine", op, ": metric must be 'euclidean' or 'cosine', got '",
                    metric, "'");
    return metric == "cosine";
}

inline Passing passing_of(const std::string& gradient) {
    return gradient == "rotation"           ? Passing::rotation
           : gradient == "straight_through" ? Passing::straight_through
                                            : Passing::none;
}

inline DType dtype_of(const char* op, const Tensor& t) {
    switch (t.scalar_type()) {
        case ScalarType::Float: return DType::float32;
        case ScalarType::Double: return DType::float64;
        case ScalarType::Half: return DType::float16;
        case ScalarType::BFloat16: return DType::bfloat16;
        default: STD_TORCH_CHECK(false, op, ": values must be float32, float64, float16 or bfloat16");
    }
}

inline Rows rows_of(const char* op, const Tensor& t) {
    return {t.const_data_ptr(), dtype_of(op, t), t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 1};
}

inline RowMask mask_of(const OptionalTensor& mask) {
    if (!mask) return {};
    return {static_cast<const bool*>(mask->const_data_ptr()), mask->stride(0), mask->stride(1)};
}

inline Indices indices_of(const char* op, const Tensor& indices, const Tensor& x, int64_t K) {
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == x.size(0) && indices.size(1) == x.size(1) &&
                        indices.scalar_type() == ScalarType::Long,
                    op, ": indices must be int64 [H, N]");
    return {static_cast<const int64_t*>(indices.const_data_ptr()), indices.stride(0), indices.stride(1), K};
}

// torch::stable::new_empty without the dispatcher, which takes longer than a small op.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; stride *= std::max<int64_t>(sizes[i--], 1)) strides[i] = stride;
    int32_t device, index;
    AtenTensorHandle made;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device, index, &made));
    return Tensor(made);
}

// Of errors and distances.
inline ScalarType real_type(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor unused(const Tensor& like, ScalarType type) { return new_tensor(like, {0}, type); }

inline Tensor new_or_unused(const Tensor& t, bool wanted) {
    return wanted ? new_tensor(t, t.sizes(), t.scalar_type()) : unused(t, t.scalar_type());
}

inline Tensor snapshot_of(const Tensor& codebook, bool wanted) {
    Tensor copy = new_or_unused(codebook, wanted);
    if (wanted) torch::stable::copy_(copy, codebook);
    return copy;
}

// [H, sum K, D], a level behind the other.
inline Tensor joined(const Tensor& like, const std::vector<Tensor>& codebooks, int64_t K) {
    Tensor all = torch::stable::new_empty(like, {like.size(0), K, like.size(2)});
    int64_t first = 0;
    for (const Tensor& codebook : codebooks) {
        Tensor part = torch::stable::narrow(all, 1, first, codebook.size(1));
        torch::stable::copy_(part, codebook);
        first += codebook.size(1);
    }
    return all;
}

inline void check_level_gradients(const char* op, const OptionalTensor& grad_quantized,
                                  const OptionalTensor& grad_error, const Tensor& x, const Tensor& codebooks,
                                  const std::vector<int64_t>& sizes, const Tensor& indices) {
    const int64_t H = x.size(0), N = x.size(1), Q = int64_t(sizes.size());
    STD_TORCH_CHECK(std::accumulate(sizes.begin(), sizes.end(), int64_t(0)) == codebooks.size(1) &&
                        indices.dim() == 3 && indices.size(0) == H && indices.size(1) == N && indices.size(2) == Q &&
                        indices.scalar_type() == ScalarType::Long,
                    op, ": sizes must add up to the codes, and indices be int64 [H, N, Q]");
    const auto is = [](const OptionalTensor& t, const std::vector<int64_t>& shape) {
        return !t || (t->dim() == int64_t(shape.size()) && std::equal(shape.begin(), shape.end(), t->sizes().begin()));
    };
    STD_TORCH_CHECK(is(grad_quantized, {H, N, x.size(2)}) && is(grad_error, {H, Q}), op,
                    ": gradients must have the shapes of quantized [H, N, D] and error [H, Q]");
}

inline float* float_data(const char* op, const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name,
                    " must be contiguous float32");
    return static_cast<float*>(t.mutable_data_ptr());
}

// Where nothing is to be done no op is called, which takes longer than a small update.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline Tensor as_float(const Tensor& t) {
    return as_contiguous(t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
}

inline void check_ema_arguments(const char* op, const Tensor& cluster_size, const Tensor& embed_avg,
                                const OptionalTensor& embed, const Tensor& counts, const Tensor& sums,
                                const Tensor& decay, const OptionalTensor& weight) {
    STD_TORCH_CHECK(embed_avg.dim() == 3 && decay.numel() == 1 && decay.scalar_type() == ScalarType::Float &&
                        decay.is_cuda() == embed_avg.is_cuda(),
                    op, ": embed_avg must be [H, K, D] and decay one float32 on its device");
    const int64_t codes = embed_avg.size(0) * embed_avg.size(1);
    STD_TORCH_CHECK(cluster_size.numel() == codes && counts.numel() == codes && sums.numel() == embed_avg.numel() &&
                        (!embed || embed->numel() == embed_avg.numel()) && (!weight || weight->numel() == codes),
                    op, ": shapes disagree with embed_avg [H, K, D]");
}

}  // namespace vqops
