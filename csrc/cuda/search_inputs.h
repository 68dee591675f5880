// What both kernels of the search take and write.
#pragma once

#include "codebook.h"

namespace vqops::cuda {

// How rows were decided, as vqops.search_statistics counts them.
enum Tier { kCertified, kDecided, kScanned, kNoCode, kTiers };

template <class T>
struct SearchInputs {
    int64_t H, N, K, D;
    Typed<T> x;     // [H, N, D]
    Rows codebook;  // [H, K, D]
    RowMask mask;
    bool cosine;
};

struct SearchOutputs {
    int64_t* indices;   // [H, N, k]
    int64_t k;
    void* distances;    // [H, N, k] or null
    DType dtype;        // of distances
    Count* tiers;       // [kTiers], added to; may be null
    uint32_t* left;     // [H, N] rows for Exhaustive, by head
    int32_t* how_many;  // [H]
};

// A lane's share of what distance.h adds up: [0] |x - c|^2 or x.c, [1] c.c for cosine.
template <class T>
VQOPS_HOST_DEVICE void add_lane(const SearchInputs<T>& in, int64_t x, int64_t c, int lane, double* sums) {
    for (int64_t i = lane; i < in.D; i += kLanes) {
        const double a = in.x.at(x, i), b = in.codebook.at(c, i);
        if (in.cosine) sums[0] = add_product(sums[0], a, b), sums[1] = add_product(sums[1], b, b);
        else sums[0] = add_square(sums[0], a, b);
    }
}

}  // namespace vqops::cuda
