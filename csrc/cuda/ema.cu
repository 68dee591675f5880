#include "ema.h"

#include "gpu.h"

namespace vqops::cuda {
namespace {

float* float_data(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), "ema_update_: ", name,
                    " must be contiguous float32");
    return static_cast<float*>(t.mutable_data_ptr());
}

Tensor as_float(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float)); }

}  // namespace

void ema_update_(Tensor cluster_size, Tensor embed_avg, OptionalTensor embed, const Tensor& counts, const Tensor& sums,
                 const Tensor& decay, double eps, OptionalTensor weight, std::string metric) {
    const char* op = "ema_update_";
    const bool cosine = is_cosine(op, metric);
    STD_TORCH_CHECK(embed_avg.dim() == 3 && decay.numel() == 1 && decay.scalar_type() == ScalarType::Float &&
                        decay.is_cuda(),
                    op, ": embed_avg must be [H, K, D] and decay one float32 on its device");
    const int64_t H = embed_avg.size(0), K = embed_avg.size(1), D = embed_avg.size(2);
    STD_TORCH_CHECK(cluster_size.numel() == H * K && counts.numel() == H * K && sums.numel() == H * K * D &&
                        (!embed || embed->numel() == H * K * D) && (!weight || weight->numel() == H * K),
                    op, ": shapes disagree with embed_avg [H, K, D]");
    const Gpu gpu(embed_avg);
    const bool counted = counts.scalar_type() == ScalarType::Long;
    const Tensor summed = as_float(sums), number = counted ? torch::stable::contiguous(counts) : as_float(counts);
    const OptionalTensor weights = weight ? OptionalTensor(as_float(*weight)) : std::nullopt;
    const Tensor total = gpu.allocate(4 * H);
    ema_update(gpu, EmaState{H, K, D, float_data(cluster_size, "cluster_size"), float_data(embed_avg, "embed_avg"),
                             embed ? float_data(*embed, "embed") : nullptr,
                             counted ? static_cast<const int64_t*>(number.const_data_ptr()) : nullptr,
                             counted ? nullptr : static_cast<const float*>(number.const_data_ptr()),
                             static_cast<const float*>(summed.const_data_ptr()),
                             weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr,
                             static_cast<const float*>(decay.const_data_ptr()),
                             static_cast<float*>(total.mutable_data_ptr()), float(eps), cosine});
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_KERNEL(ema_update_); }
