// The bfloat16 instructions one value after the other, as the processor rounds. vdpbf16ps and vcvtneps2bf16: denormals
// in and out are zero, and each of the two products is added with one rounding to nearest, the high half's first.
#pragma once

#include <cstdint>

namespace vqops {

static inline float flushed(float value) { return __builtin_fabsf(value) < 0x1p-126f ? 0 * value : value; }

static inline float from_pair(uint32_t half) { return flushed(__builtin_bit_cast(float, half << 16)); }

static inline uint16_t to_pair(float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, flushed(value));
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float add_pair(float sum, uint32_t x, uint32_t c) {
    const float high = flushed(__builtin_fmaf(from_pair(x >> 16), from_pair(c >> 16), flushed(sum)));
    return flushed(__builtin_fmaf(from_pair(x & 0xffff), from_pair(c & 0xffff), high));
}

// tdpbf16ps of a whole tile: 16 codes of 32 dimensions, 16 rows side by side by pairs of them. The products of even and
// of odd dimensions are added up from 0 on, then these two, then the sum goes to what the tile holds; each addition
// rounds to nearest, and at each step denormals are zero.
union ModelTile {
    float sum[16][16];
    uint32_t pair[16][16];
};

// A product of two bfloat16 is exact in float, unless it is very small.
static inline float add_exact(float sum, float x, float c) {
    const float product = x * c;
    const bool exact = __builtin_fabsf(product) >= 0x1p-100f || x == 0 || c == 0;
    return flushed(exact ? sum + product : __builtin_fmaf(x, c, sum));
}

static inline void multiply_tiles(ModelTile& to, const ModelTile& codes, const ModelTile& rows) {
    float even[16], odd[16];
    for (int j = 0; j < 16; j++) {
        for (int r = 0; r < 16; r++) even[r] = odd[r] = 0;
        for (int i = 0; i < 16; i++) {
            const uint32_t c = codes.pair[j][i];
            const float low = from_pair(c & 0xffff), high = from_pair(c >> 16);
            for (int r = 0; r < 16; r++) {
                even[r] = add_exact(even[r], from_pair(rows.pair[i][r] & 0xffff), low);
                odd[r] = add_exact(odd[r], from_pair(rows.pair[i][r] >> 16), high);
            }
        }
        for (int r = 0; r < 16; r++) to.sum[j][r] = flushed(flushed(to.sum[j][r]) + flushed(even[r] + odd[r]));
    }
}

}  // namespace vqops
