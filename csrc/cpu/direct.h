// Search without a prepared codebook, for few rows: preparing costs more than the search.
#pragma once

#include "parallel.h"
#include "rows.h"
#include "search.h"

namespace vqops {

// Packing a code costs about as much as comparing it with this many rows (measured at D from 8 to 256).
constexpr int64_t kDirectRows = 96;

// Whether a search of this shape should not prepare the codebook. float64 needs the packed path's rounding.
inline bool is_direct(int64_t N, const Rows& x, const Rows& codebook) {
    return N <= kDirectRows && x.dtype != DType::float64 && codebook.dtype != DType::float64;
}

void search_direct(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                   const SearchResult& result, const Parallel& parallel);

}  // namespace vqops
