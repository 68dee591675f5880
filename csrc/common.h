// What the bindings of both devices share: arguments as the kernels take them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

namespace vqops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Callers get readable errors from Python; these keep a kernel from reading what is not there.
inline void check_search_arguments(const char* op, const Tensor& x, const Tensor& codebook, const OptionalTensor& mask) {
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

}  // namespace vqops

// Torch's shim of its CUDA half, which a torch without CUDA does not have: weak, so that the kernels load there, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
