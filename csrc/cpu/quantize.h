// What follows the search: the codes in place of the rows, the errors, and the sums for the EMA update.
#pragma once

#include <cstdint>

#include "../distance.h"
#include "code_sums.h"
#include "parallel.h"
#include "rows.h"
#include "search.h"

namespace vqops {

// x / max(|x|, 1e-6) in float64, in place. Returns the norm, at least 1e-6.
double to_unit(double* row, int64_t padded, int64_t D);

// quantized [H, N, D] of x's dtype and error [H, N] (float64 where x is, else float32). Rows without a code get zeros
// if they are masked, else NaN.
struct Gathered {
    void *quantized, *error;
};

// The nearest codes (search.h) and, while a block's rows are still in cache, what stands in their place.
void search_and_gather(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const void* packed, int64_t* indices, const Gathered& result, const Parallel& parallel);

// Weighted counts, and sums of the rows of x, or of their units for cosine. weight may be null; counts are then int64.
struct Sums {
    void* counts;
    float* sums;
};
// Returns the place of an index out of range, or -1.
int64_t sum_codes(const SearchShape& shape, const Rows& x, const Indices& indices, const Rows* weight,
                  const Sums& result, const Parallel& parallel);

}  // namespace vqops
