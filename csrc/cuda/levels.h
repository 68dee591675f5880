// Tensors of a residual quantizer's levels.
#pragma once

#include "gpu.h"

namespace vqops::cuda {

// How many levels run, where the device reads it.
inline const int64_t* running_levels(const char* op, const OptionalTensor& levels) {
    if (!levels) return nullptr;
    STD_TORCH_CHECK(levels->numel() == 1 && levels->scalar_type() == ScalarType::Long && levels->is_cuda(), op,
                    ": levels must be one int64 on x's device");
    return static_cast<const int64_t*>(levels->const_data_ptr());
}

// A level's part of a tensor [H, sum K, ...] to write to: itself where it is contiguous and of the type, else a tensor
// that give() copies there.
class LevelPart {
public:
    LevelPart(Tensor all, int64_t first, int64_t K, ScalarType type)
        : there_(torch::stable::narrow(all, 1, first, K)),
          own_(there_.is_contiguous() && there_.scalar_type() == type
                   ? there_
                   : torch::stable::new_empty(there_, there_.sizes(), type)) {}

    Tensor& tensor() { return own_; }
    void give() {
        if (own_.const_data_ptr() != there_.const_data_ptr()) torch::stable::copy_(there_, own_);
    }

private:
    Tensor there_, own_;
};

}  // namespace vqops::cuda
