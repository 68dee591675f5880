#include "ema.h"

#include "gpu.h"

namespace vqops::cuda {

void ema_update_(Tensor cluster_size, Tensor embed_avg, OptionalTensor embed, const Tensor& counts, const Tensor& sums,
                 const Tensor& decay, double eps, OptionalTensor weight, std::string metric) {
    const char* op = "ema_update_";
    const bool cosine = is_cosine(op, metric);
    check_ema_arguments(op, cluster_size, embed_avg, embed, counts, sums, decay, weight);
    const int64_t H = embed_avg.size(0), K = embed_avg.size(1), D = embed_avg.size(2);
    const Gpu gpu(embed_avg);
    const bool counted = counts.scalar_type() == ScalarType::Long;
    const Tensor summed = as_float(sums), number = counted ? torch::stable::contiguous(counts) : as_float(counts);
    const OptionalTensor weights = weight ? OptionalTensor(as_float(*weight)) : std::nullopt;
    const Tensor total = gpu.allocate(4 * H);
    ema_update(gpu, EmaState{H, K, D, float_data(op, cluster_size, "cluster_size"),
                             float_data(op, embed_avg, "embed_avg"), embed ? float_data(op, *embed, "embed") : nullptr,
                             counted ? static_cast<const int64_t*>(number.const_data_ptr()) : nullptr,
                             counted ? nullptr : static_cast<const float*>(number.const_data_ptr()),
                             static_cast<const float*>(summed.const_data_ptr()),
                             weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr,
                             static_cast<const float*>(decay.const_data_ptr()),
                             static_cast<float*>(total.mutable_data_ptr()), float(eps), cosine});
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_KERNEL(ema_update_); }
