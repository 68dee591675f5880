// The search as an op, for the ops that begin with one, and what a GPU is able to, for those that choose as it does.
#pragma once

#include "gpu.h"

namespace vqops::cuda {

struct Abilities;  // search.h
Abilities abilities_of(int device);

Tensor nearest(const Tensor& x, const Tensor& codebook, OptionalTensor mask, std::string metric,
               OptionalTensor prepared);

}  // namespace vqops::cuda
