// The gradients of residual quantization: of all levels together to x, and of each to its codebook.
#pragma once

#include <vector>

#include "quantize_backward.h"

namespace vqops {

struct LevelGradients {
    int64_t H, N, D;
    const Rows* quantized;  // gradient of quantized [H, N, D]; null where nothing came
    const Rows* error;      // gradient of error, as [H, Q, 1]; null where nothing came
    Rows x, codebooks;      // [H, N, D]; [H, sum K, D], a level behind the other
    std::vector<int64_t> sizes;  // K of each level
    const int64_t* indices;      // [H, N, Q]
    RowMask mask;
    int64_t running;  // the first levels, which ran
    Passing passing;
    bool per_level;  // the gradient of quantized passes once a level, else once
    double codebook_error_scale;
    bool units;

    int64_t Q() const { return int64_t(sizes.size()); }
};

// grad_x [H, N, D] of x's dtype and grad_codebooks [H, sum K, D] of the codebooks'; null leaves one out. Indices are -1
// or codes.
void levels_backward(const LevelGradients& in, void* grad_x, void* grad_codebooks, const Parallel& parallel);

}  // namespace vqops
