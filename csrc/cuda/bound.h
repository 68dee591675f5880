// The error bound of the fp16 screening pass, each constant with its cause in docs/exactness.md.
#pragma once

#include "../host_device.h"

namespace vqops {

// X = s (x - m), C = s (c - m) with a centre m and a power of two s; for cosine X = s x and C = c / |c| - m.
// Stored: X' and C', float16 times a power of two per row and per tile. t = |C|^2 / 2 - X.C orders the codes.
constexpr double kFarCode = 0x1p20;       // |C| beyond: left out
constexpr double kReach = 0x1p18;         // 2 |X| + the smallest radius beyond: compared in float64, if a code is far
constexpr float kFarBound = 0x1p38f;      // at most |C|^2 / 2 - X.C of a far code, for rows within kReach
constexpr double kFarRow = 0x1p40;        // |X| beyond: compared in float64 with every code
constexpr double kSmallestRadius = 0x1p-24;
constexpr double kMostError = 0x1p-10;    // of a code, relative to its radius, which grows where the error is larger
constexpr int kSmallestExponent = -46;    // of a norm, for the powers of two
constexpr float kAbsentStart = 0x1p120f;  // more than any start: a code that is left out
constexpr float kNoThreshold = 0x1p110f;  // of a row at first: only codes that are left out lie above
constexpr double kRoom = 1.02;            // a row's radius: its own share of the epilogue; twice that in its spread
constexpr double kEpilogue = 0x1p-21;     // 8 u, of |X'| r
constexpr double kSpread = 0x1p-20;       // twice that, from the lower to the upper bound
constexpr double kStart = 0x1p-20;        // the epilogue's of |C|^2 / 2, and rounding of start; three times in slack
constexpr double kTwice = 2.02;           // 2; the decision's error in |C|^2, two halves, twice that in slack
constexpr double kRest = 2.05;            // what L has none of, in both bounds
constexpr double kUpward = 1 + 0x1p-20;   // to float32

// Of the tensor cores, relative to |X'| |C'|, for a depth that is a multiple of 16.
VQOPS_HOST_DEVICE double accumulation(int64_t depth) { return 1.5 * double(depth + 16) * 0x1p-23; }

// Of the float64 decision: relative to |X|^2 + 2 (|C|^2 / 2), for cosine to |X|.
VQOPS_HOST_DEVICE double decision(int64_t D, bool cosine) {
    return cosine ? 4 * double(D + 16) * 0x1p-53 : 1.01 * double(D / 8 + 8) * 0x1p-53;
}

// Row bounds: a row's part of the bounds with every code.
struct RowBound {
    float radius;  // times the code's radius: taken from the lower bound
    float spread;  // times the code's radius: from the lower to the upper bound
    float rest;    // from the lower to the upper bound
};

// norm: |X|. error: |X - X'|. worst: the largest (|C - C'| + accumulation |C'|) / radius of a code. In float32, which
// every GPU is fast in: kUpward covers the roundings of radius.
VQOPS_HOST_DEVICE RowBound row_bound(float norm, float error, float worst, int64_t D, bool cosine) {
    const float room = float(kRoom), stored = norm + error;
    const float radius = room * (error + 0x1p-45f * norm + stored * (worst + float(kEpilogue))) * float(kUpward);
    const float rest = float(decision(D, cosine)) * (cosine ? norm : norm * norm) + 0x1p-90f * (1 + norm);
    return {radius, 2 * room * radius + stored * float(kSpread), float(kRest) * rest};
}

// Code bounds: a code's part. half: |C|^2 / 2, 0 for cosine.
VQOPS_HOST_DEVICE float code_start(double half, int64_t D) {
    return float(half * (1 - kStart - kTwice * decision(D, false)));
}
// What U has more of |C|^2 / 2 than L, in units of start.
VQOPS_HOST_DEVICE float slack_of_start(int64_t D) {
    return float((3 * kStart + 2 * kTwice * decision(D, false)) * (1 + 0x1p-16));
}

// start - X'.C', from the accumulated product in units of `unit`: what the bounds are made of.
VQOPS_HOST_DEVICE float score_of(float product, float unit, float start) { return fmaf(-unit, product, start); }

// Lower bound of t less its decision's error.
VQOPS_HOST_DEVICE float lower_bound(float score, float code_radius, const RowBound& row) {
    return fmaf(-row.radius, code_radius, score);
}

// The score above which a code of this radius, or a smaller one, has a lower bound above the threshold.
VQOPS_HOST_DEVICE float score_limit(float threshold, float code_radius, const RowBound& row) {
    return fmaf(row.radius, code_radius, threshold);
}

// Upper bound of t and its decision's error, from the lower one; slack: slack_of_start().
VQOPS_HOST_DEVICE float upper_bound(float lower, float start, float slack, float code_radius, const RowBound& row) {
    return fmaf(row.spread, code_radius, lower) + fmaf(slack, start, row.rest);
}

// 2^exponent as a double.
VQOPS_HOST_DEVICE double power_of_two(int exponent) {
    const uint64_t bits = uint64_t(exponent + 1023) << 52;
    double value;
    memcpy(&value, &bits, 8);
    return value;
}

// floor(log2(value)) for positive normal numbers; -1023 for 0 and denormals.
VQOPS_HOST_DEVICE int exponent_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, 8);
    return int(bits >> 52 & 0x7ff) - 1023;
}

// The exponent of the power of two that a vector of this norm is divided by: its elements stay below 2^15.
VQOPS_HOST_DEVICE int unit_exponent(double norm) {
    const int exponent = exponent_of(norm);
    return (exponent > kSmallestExponent ? exponent : kSmallestExponent) - 14;
}

// Floats in the order of integers, for an atomic minimum.
VQOPS_HOST_DEVICE int32_t ordered(float value) {
    int32_t bits;
    memcpy(&bits, &value, 4);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}
VQOPS_HOST_DEVICE float from_ordered(int32_t bits) {
    bits = bits < 0 ? bits ^ 0x7fffffff : bits;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

}  // namespace vqops
