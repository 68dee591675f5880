// The arithmetic of an EMA update.
#pragma once

#include "distance.h"

namespace vqops {

// As torch.lerp: exact at both ends.
VQOPS_HOST_DEVICE float lerp(float from, float to, float step) {
    return step < 0.5f ? from + step * (to - from) : to - (to - from) * (1 - step);
}

// Laplace smoothing of a cluster size (van den Oord et al. 2017, appendix A.1).
VQOPS_HOST_DEVICE float smoothed_size(float size, float total, float K, float eps) {
    return (size + eps) / (total + K * eps) * total;
}

VQOPS_HOST_DEVICE bool is_finite(double value) { return value - value == 0; }

}  // namespace vqops
