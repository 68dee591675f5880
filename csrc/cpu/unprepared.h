// Search without a prepared codebook, for few rows: preparing costs more than the search, and what is prepared is laid
// out for more rows.
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

// Of a prepared codebook: screening one row takes as long as a tile of rows, so few rows are compared sooner with the
// codes as they are (Instructions.direct). Measured on one thread of an AMD EPYC with AVX-512 BF16, 1 to 128 rows, K
// from 512 to 16384: both take the same time at 2 to 3 rows with AVX-512 BF16, 5 to 6 with AVX-512, 1 to 2 with AVX2.
// One row with D = 256, K = 2048 takes 42 us instead of 71, 137 and 62. With AMX, on a Xeon, 133 instead of 79: never.
constexpr int64_t kDirectDimensions = 32;  // per row; below, what is not products counts for more
constexpr int64_t kDirectBytes = 4 << 20;  // of the codebooks; they come from the third cache, as bfloat16 half of them

// A search with a preparation should do without it. The norms that cosine computes of the codes cost as much as a row.
inline bool is_direct(const SearchShape& shape, const Rows& x, const Rows& codebook) {
    const Instructions& set = instructions();
    const int64_t rows = shape.N + (shape.cosine ? 1 : 0);
    return is_unprepared(shape.N, x, codebook) && codebook.has_float_rows() &&
           rows <= set.direct && shape.D >= rows * kDirectDimensions &&
           shape.H * shape.K * shape.D <= kDirectBytes / int64_t(sizeof(float));
}

// Settles a queue of `count` finite rows of head h in one thread, counting them as kScanned.
void scan_queue(const SearchShape& shape, const Rows& x, const Rows& codebook, int64_t h, const int64_t* rows,
                int64_t count, Decision& decision, int64_t k);

void search_unprepared(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const SearchResult& result, const Parallel& parallel);

}  // namespace vqops
