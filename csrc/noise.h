// Gumbel noise to the last bit, for all backends: vqops/reference/noise.py in C++.
//
// Built with -ffp-contract=off and -fmad=false, as distance.h is: each operation rounds for itself.
#pragma once

#include "contract.h"
#include "host_device.h"

namespace vqops {

// Four random words, for codes 4 `four` to 4 `four` + 3 of a row of a head: Philox4x32-10.
VQOPS_HOST_DEVICE void philox(uint64_t key, uint64_t row, uint32_t four, uint32_t head, uint32_t* words) {
    uint32_t c0 = uint32_t(row), c1 = uint32_t(row >> 32), c2 = four, c3 = head;
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < kPhiloxRounds; round++) {
        const uint64_t a = uint64_t(c0) * kFirstMultiplier, b = uint64_t(c2) * kSecondMultiplier;
        c0 = uint32_t(b >> 32) ^ c1 ^ k0;
        c1 = uint32_t(b);
        c2 = uint32_t(a >> 32) ^ c3 ^ k1;
        c3 = uint32_t(a);
        k0 += kFirstStep;
        k1 += kSecondStep;
    }
    words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Of a positive, normal value: m 2^e with m from sqrt(1/2) to sqrt(2), e log(2) + 2 atanh((m - 1) / (m + 1)).
VQOPS_HOST_DEVICE double logarithm(double value) {
    int64_t bits;
    memcpy(&bits, &value, 8);
    const int64_t exponent = (bits - 0x3FE6A09E667F3BCD) >> 52;
    bits -= int64_t(uint64_t(exponent) << 52);
    double m;
    memcpy(&m, &bits, 8);
    const double s = (m - 1) / (m + 1);
    const double z = s * s;
    double series = 2.0 / 21;
    VQOPS_UNROLL(9)
    for (int n = 9; n > 0; n--) {
        const double product = series * z;
        series = product + 2.0 / (2 * n + 1);
    }
    const double whole = double(exponent) * 0x1.62e42fefa39efp-1, twice = s * 2, cube = s * z;
    const double tail = cube * series;
    return whole + (twice + tail);
}

// -log(-log u), u = (word + 1/2) / 2^32.
VQOPS_HOST_DEVICE double gumbel(uint32_t word) { return -logarithm(-logarithm((double(word) + 0.5) * 0x1p-32)); }

// The logit of a cost: -|x - c|, or x.c / (|x| |c|), 0 for x = 0.
VQOPS_HOST_DEVICE double logit_of(double cost, double norm, bool cosine) {
    if (!cosine) return -std::sqrt(cost);
    if (std::isinf(cost)) return -cost;
    return norm > 0 ? -cost / norm : 0;
}

// A key with what decides between equal ones: less cost, then the lower index.
struct Drawn {
    double key, cost;
    int64_t index;  // -1: no code yet

    VQOPS_HOST_DEVICE bool before(const Drawn& other) const {
        if (index < 0 || other.index < 0) return index >= 0;
        if (key != other.key) return key > other.key;
        return cost < other.cost || (cost == other.cost && index < other.index);
    }
};

// Of the noise from above, T g <= most - step bits, where bits are those of the float of the word's complement, halved:
// g <= -log v with v = 1 - u, and log2 v >= e + f for v = 2^e (1 + f). docs/exactness.md.
struct NoiseBound {
    float step, most;

    VQOPS_HOST_DEVICE explicit NoiseBound(double temperature)
        : step(float(0x1.62e42fefa39efp-24 * temperature)),
          most(float((158 * 0x1.62e42fefa39efp-1 + 0x1p-12) * temperature)) {}
};

}  // namespace vqops
