// vdpbf16ps and vcvtneps2bf16, one lane after the other, as the processor rounds: denormals in and out are zero, and
// each of the two products is added with one rounding to nearest, the high half's first.
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

}  // namespace vqops
