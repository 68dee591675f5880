// After the search: the codes in place of the rows, and the errors.
#pragma once

#include "search.h"

namespace vqops {

// quantized [H, N, D] of x's dtype and error [H, N] (float64 where x is, else float32). Rows without a code get zeros
// if they are masked, else NaN.
struct Gathered {
    void *quantized, *error;
    bool units;  // errors of x / max(|x|, 1e-6)
};

// The nearest codes (search.h) and, while a block's rows are still in cache, what stands in their place.
void search_and_gather(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const void* packed, int64_t* indices, const Gathered& result, const Parallel& parallel);

}  // namespace vqops
