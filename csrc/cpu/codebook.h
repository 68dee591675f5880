// The codebook as the screening pass reads it: centred, scaled, in panels, with the error bound's constants.
//
// One head, in sections of whole cache lines; a word is a float or, for the sets that screen so, two bfloat16:
//   Header | centre [D to 16] | start [K to 32] | slack [K to 32] | code [K to 32] | panels [depth][codes per panel]
// The last of a panel's words hold the codes' radii (bfloat16: radius and what rounding took away).
// docs/exactness.md has the proof of the bound.
#pragma once

#include <cstdint>

#include "instructions.h"
#include "parallel.h"
#include "rows.h"

namespace vqops {

struct Header {
    int32_t layout;    // layout(); anything else is no codebook of ours
    int32_t cosine;
    int64_t K, D;
    int64_t screened;  // codes in panels: finite, no duplicates of a lower index, not far
    int64_t far;       // finite codes too long for float32 next to the others; in `code` behind the screened ones
    int64_t repeats;   // codes equal to one of lower index, behind those; only a search for several codes needs them
    float scale;       // power of two that brings the codes to about norm 1; 1 for cosine
    float decision;    // what the float64 decision itself may err by, in units of |x|^2 (cosine: |x|), scaled
    int64_t first;     // the lowest index of a finite code; -1 where none is
};
static_assert(sizeof(Header) == 64);
inline int32_t layout() { return 0x76710010 + instructions().layout; }

// Words of a code: its dimensions, and the coefficients of its bound.
inline int64_t depth_of(int64_t D) { return instructions().pairs ? (D + 1) / 2 + 1 : D + 1; }

// The next bfloat16 that is not smaller than a positive value; at least the smallest that vdpbf16ps doesn't take for 0.
static inline uint16_t up_to_bfloat16(float value) {
    uint32_t bits;
    value = value > 0x1p-126f ? value : 0x1p-126f;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0xffff) >> 16);
}

// A code further than this from the centre, in units of the typical norm, is decided in float64 for every row.
constexpr float kFar = 0x1p40f;

// The sections of one packed head.
struct Packed {
    Header* header;
    float* centre;
    float* start;     // |c|^2 / 2 less its own error, the accumulator's first value; infinite where there is no code
    float* slack;     // what the upper bound adds to the lower one for the code alone
    int32_t* code;    // its index in the codebook
    void* panels;
    int64_t depth;

    static int64_t bytes(int64_t K, int64_t D) {
        return 64 + 4 * round_up(D, 16) + 4 * round_up(K, 32) * (depth_of(D) + 3);
    }

    Packed(const void* memory, int64_t K, int64_t D) {
        char* p = static_cast<char*>(const_cast<void*>(memory));
        const int64_t codes = round_up(K, 32);
        header = reinterpret_cast<Header*>(p);
        centre = reinterpret_cast<float*>(p + 64);
        start = centre + round_up(D, 16);
        slack = start + codes;
        code = reinterpret_cast<int32_t*>(slack + codes);
        panels = code + codes;
        depth = depth_of(D);
    }

    int64_t panel_count() const { return (header->screened + instructions().codes - 1) / instructions().codes; }

    Panels as_read() const { return {panels, start, slack, panel_count(), depth}; }
};

// Constants of a row's bound (docs/exactness.md): its coefficients, behind its dimensions in `words`, and what the upper
// bound adds for every code, which is returned.
float row_bound(const RowNorms& norms, const Packed& packed, int64_t D, bool cosine, uint32_t* words);

// Prepare head h of a codebook [H, K, D] into `memory` of Packed::bytes(K, D).
void pack_codebook(const Rows& codebook, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                   const Parallel& parallel);

}  // namespace vqops
