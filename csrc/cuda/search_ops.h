// The search as an op, for the ops that begin with one.
#pragma once

#include "gpu.h"

namespace vqops::cuda {

Tensor nearest(const Tensor& x, const Tensor& codebook, OptionalTensor mask, std::string metric,
               OptionalTensor prepared);

}  // namespace vqops::cuda
