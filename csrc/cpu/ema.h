// The exponential moving average of a codebook, one head.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace vqops {

// All of one head and contiguous: size [K], average [K, D], codes [K, D] (null: left alone), sums [K, D]; counts [K]
// as int64 or float; weight [K] or null.
struct EmaHead {
    float *size, *average, *codes;
    const int64_t* counts;
    const float* weighted_counts;
    const float* sums;
    const float* weight;
};

void ema_update(const EmaHead& head, int64_t K, int64_t D, float decay, float eps, bool cosine,
                const Parallel& parallel);

}  // namespace vqops
