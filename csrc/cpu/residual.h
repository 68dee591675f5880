// Residual quantization on the CPU: each level quantizes what the levels before it have left of a row.
#pragma once

#include <vector>

#include "search.h"

namespace vqops {

struct Level {
    Rows codebook;       // [H, K, D]
    int64_t K;
    const void* packed;  // its preparation (search.h), or null: searched without one
};

struct ResidualInputs {
    int64_t H, N, D;
    Rows x;
    RowMask mask;
    std::vector<Level> levels;
    int64_t running;  // the first levels, which run
    bool cosine;
    bool units;  // errors and sums of r / max(|r|, 1e-6)

    int64_t Q() const { return int64_t(levels.size()); }
    DType real() const { return x.dtype == DType::float64 ? DType::float64 : DType::float32; }  // of what is left
};

// quantized [H, N, D] of x's dtype, indices [H, N, Q], error [H, Q] (float64 where x is, else float32).
struct ResidualResult {
    void* quantized;
    int64_t* indices;
    void* error;
};

void quantize_levels(const ResidualInputs& in, const ResidualResult& result, const Parallel& parallel);

// counts int64 [H, sum K] and sums float32 [H, sum K, D] of what each level quantized (code_sums.h).
void sum_levels(const ResidualInputs& in, const int64_t* indices, int64_t* counts, float* sums,
                const Parallel& parallel);

}  // namespace vqops
