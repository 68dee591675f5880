#include "products.h"

#include "search_ops.h"

namespace vqops::cuda {

Tensor tensor_core_products(const Tensor& x, const Tensor& codes) {
    const char* op = "tensor_core_products";
    for (const Tensor* t : {&x, &codes})
        STD_TORCH_CHECK(t->scalar_type() == ScalarType::Half && t->dim() == 2 && t->is_contiguous(), op,
                        ": x must be contiguous float16 [N, D], and codes [K, D]");
    STD_TORCH_CHECK(x.is_cuda() && codes.is_cuda() && x.get_device_index() == codes.get_device_index(), op,
                    ": x and codes must be on the same GPU");
    const int64_t N = x.size(0), K = codes.size(0), D = x.size(1);
    STD_TORCH_CHECK(codes.size(1) == D && D > 0, op, ": codes has D=", codes.size(1), ", x has D=", D,
                    "; it must be the same, and not 0");
    STD_TORCH_CHECK(K <= kMostCodes, op, ": codes may have up to 2^30 codes");
    Tensor products = torch::stable::new_empty(x, {N, K}, ScalarType::Float);
    if (N * K == 0) return products;
    const Gpu gpu(x);
    const Tensor memory = gpu.allocate(Packed::bytes(K, D));
    const ProductsInputs in = {N, K, D, static_cast<const Float16*>(x.const_data_ptr()),
                               static_cast<const Float16*>(codes.const_data_ptr()),
                               static_cast<float*>(products.mutable_data_ptr())};
    const bool fits = multiply(gpu, in, memory.mutable_data_ptr(), abilities_of(x.get_device_index()));
    STD_TORCH_CHECK(fits, op, ": the search has no fast pass for D=", D, " on this GPU");
    return products;
}

}  // namespace vqops::cuda

STABLE_TORCH_LIBRARY_IMPL(vqops, CUDA, m) { VQOPS_CUDA_KERNEL(tensor_core_products); }
