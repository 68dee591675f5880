// Search without a prepared codebook, for few rows: preparing costs more than the search.
#pragma once

#include "decide.h"
#include "parallel.h"
#include "rows.h"
#include "search.h"

namespace vqops {

// Packing a code costs about as much as comparing it with this many rows (measured at D from 8 to 256).
constexpr int64_t kUnpreparedRows = 96;

// A search of this shape should not prepare the codebook. float64 needs the packed path's rounding.
inline bool is_unprepared(int64_t N, const Rows& x, const Rows& codebook) {
    return N <= kUnpreparedRows && x.dtype != DType::float64 && codebook.dtype != DType::float64;
}

// Settles a queue of `count` finite rows of head h in one thread, counting them as kScanned.
void scan_queue(const SearchShape& shape, const Rows& x, const Rows& codebook, int64_t h, const int64_t* rows,
                int64_t count, Decision& decision, int64_t k);

void search_unprepared(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const SearchResult& result, const Parallel& parallel);

}  // namespace vqops
