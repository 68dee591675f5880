// Inputs and outputs of the kernels of the search.
#pragma once

#include "../contract.h"
#include "codebook.h"

namespace vqops::cuda {

template <class T>
struct SearchInputs : SearchShape {
    Typed<T> x;     // [H, N, D]
    Rows codebook;  // [H, K, D]
    RowMask mask;
};

// State of a row in the fast pass: searched, given the first finite code because it is zero and cosine has all
// codes alike, left out, or queued for Scan.
enum State : int32_t { kSearched, kZero, kOutside, kQueued };

constexpr int kCapacity = 16;  // random and clustered data leave 1 to 3 candidates

// Of a row, which the fast pass leaves.
struct Candidates {
    State state;
    int32_t threshold;  // ordered(upper bound)
    int32_t count;      // more than kCapacity: not all are held
    int32_t code[kCapacity];
    float lower[kCapacity];

    VQOPS_HOST_DEVICE void clear(State of_row) {
        state = of_row, count = 0;
        threshold = ordered(of_row == kSearched ? kNoThreshold : -INFINITY);
    }

    VQOPS_HOST_DEVICE void drop_excluded() {
        if (count > kCapacity) {  // some were not held: the row takes no more
            threshold = ordered(-INFINITY);
            return;
        }
        int kept = 0;
        for (int i = 0; i < count; i++) {
            if (lower[i] > from_ordered(threshold)) continue;
            code[kept] = code[i], lower[kept++] = lower[i];
        }
        count = kept;
    }
};

// The nearest of the codes that a block has seen.
struct Best {
    double cost;
    int32_t index;
};

struct SearchOutputs {
    int64_t* indices;   // [H, N, k]
    int64_t k;
    void* distances;    // [H, N, k] or null
    DType dtype;        // of distances
    Count* tiers;       // [kTiers], added to; may be null
    uint32_t* queue;    // [H, N] rows for Scan, by head
    int32_t* queued;    // [H] how many of them; starts at 0
    int32_t* arrived;   // [H, shared_groups(N)] blocks of Scan that are done with their share; starts at 0
    Best* parts;        // [H, parts_of(N, K)] of rows whose codes several blocks of Scan share
    Candidates* lists;  // [H, shares, N] of rows whose codes several blocks of Screen share
};

constexpr int64_t kMostParts = 8192, kLeastShare = 512;  // a head, and codes
constexpr int kRowsOfScan = 8;                           // of a block at a time

VQOPS_HOST_DEVICE int64_t parts_of(int64_t N, int64_t K) {
    const int64_t most = N * ((K + kLeastShare - 1) / kLeastShare);
    return most < kMostParts ? most : kMostParts;
}

// Groups of rows whose codes blocks of Scan may share, two at least.
VQOPS_HOST_DEVICE int64_t shared_groups(int64_t N) {
    const int64_t most = kMostParts / 2 < N ? kMostParts / 2 : N;
    return (most + kRowsOfScan - 1) / kRowsOfScan;
}

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
