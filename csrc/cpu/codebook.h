// The codebook as the screening pass reads it: centred, scaled, in panels, with the error bound's constants.
//
// One head, in sections of whole cache lines:
//   Header | centre [D to 16] | start [K to 32] | slack [K to 32] | code [K to 32] | panels, laid out by the set
// docs/exactness.md has the proof of the bound.
#pragma once

#include <cstdint>
#include <vector>

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
inline int32_t layout(const Instructions& set = instructions()) { return 0x76710010 + set.layout; }

// A code further than this from the centre, in units of the typical norm, is decided in float64 for every row.
constexpr float kFar = 0x1p40f;

// The sections of one packed head.
struct Packed {
    Header* header;
    float* centre;
    float* start;     // |c|^2 / 2 less its own error, the accumulator's first value; infinite where there is no code
    float* slack;     // what the upper bound adds to the lower one for the code alone
    int32_t* code;    // its index in the codebook
    char* panels;

    static int64_t bytes(int64_t K, int64_t D, const Instructions& set = instructions()) {
        return 64 + 4 * round_up(D, 16) + round_up(K, 32) * (set.code_bytes(D) + 12);
    }

    Packed(const void* memory, int64_t K, int64_t D) {
        char* p = static_cast<char*>(const_cast<void*>(memory));
        const int64_t codes = round_up(K, 32);
        header = reinterpret_cast<Header*>(p);
        centre = reinterpret_cast<float*>(p + 64);
        start = centre + round_up(D, 16);
        slack = start + codes;
        code = reinterpret_cast<int32_t*>(slack + codes);
        panels = reinterpret_cast<char*>(code + codes);
    }

    int64_t panel_count(const Instructions& set) const { return (header->screened + set.codes - 1) / set.codes; }

    Panels as_read(const Instructions& set) const { return {panels, start, slack, panel_count(set), header->D}; }
};

// `rest` of a row's bound (docs/exactness.md): what the upper one adds for every code.
float rest_of(double norm, const Header& header);

// Prepare head h of a codebook [H, K, D] into `memory` of Packed::bytes(K, D, set).
void pack_codebook(const Rows& codebook, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                   const Parallel& parallel, const Instructions& set = instructions());

// The same for draws, into Packed::bytes(places, D, drawing_instructions()): all codes in the order of the generator's
// words, which come in fours. Of each 4 lanes codes, code 4 i + j is in place j lanes + i. Those that are not finite are
// absent; far ones are absent and listed.
inline int64_t places_of(int64_t K) { return round_up(K, 4 * drawing_instructions().lanes); }
void pack_fours(const Rows& codebook, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                std::vector<int32_t>& far, const Parallel& parallel);

}  // namespace vqops
