// The backward of a quantizer's bottleneck: straight-through or rotation, the errors' gradient, and the codebook's.
#pragma once

#include <cstdint>

#include "code_sums.h"
#include "parallel.h"
#include "rows.h"
#include "search.h"

namespace vqops {

struct BackwardInputs {
    const Rows* quantized;  // gradient of quantized [H, N, D]; null where nothing came
    const Rows* error;      // gradient of error, as [H, N, 1]; null where nothing came
    Rows x, codebook;
    Indices indices;
    RowMask mask;
    Passing passing;
    double codebook_error_scale;
    bool units;  // x stands for x / max(|x|, 1e-6), and the gradient goes through the division
};

// grad_x [H, N, D] of x's dtype and grad_codebook [H, K, D] of the codebook's; null leaves one out. float64 where x or
// the codebook is, else float32. Returns the place of an index out of range, or -1.
int64_t backward(const SearchShape& shape, const BackwardInputs& in, void* grad_x, void* grad_codebook,
                 const Parallel& parallel);

}  // namespace vqops
