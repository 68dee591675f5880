// Nearest-codebook search on the CPU, without torch.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "parallel.h"
#include "rows.h"

namespace vqops {

struct SearchResult {
    int64_t* indices;         // [H, N, k], -1 where there is no code
    int64_t k;                // codes per row, at most kLargestK
    void* distances;          // [H, N, k], float64 for float64 x, else float32; null for the index alone, with k = 1
    int64_t* tiers;           // [kTiers], added to; may be null
};

// The k nearest codes of each row, nearest first. `packed` holds H heads of Packed::bytes(K, D) each; null searches
// without preparation (unprepared.h). `follow` is called with (h, begin, end) by the thread that settled those rows.
using Follow = std::function<void(int64_t h, int64_t begin, int64_t end)>;
void search(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask, const void* packed,
            const SearchResult& result, const Parallel& parallel, const Follow& follow = {});

}  // namespace vqops
