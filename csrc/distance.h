// The arithmetic that decides between codes, to the last bit, element by element: vqops/reference/distance.py in C++.
//
// Eight partial sums over i = j mod 8, ascending, multiply and add rounded separately, then a fixed tree. Built with
// -ffp-contract=off and -fmad=false: a fused multiply-add would round differently. csrc/cpu/exact.h is the same on
// vectors of eight; here eight threads, or one after another, take a partial sum each.
#pragma once

#include "contract.h"
#include "host_device.h"

namespace vqops {

constexpr int kLanes = 8;

VQOPS_HOST_DEVICE double add_square(double sum, double x, double c) {
    const double e = x - c;
    const double square = e * e;
    return sum + square;
}

VQOPS_HOST_DEVICE double add_product(double sum, double x, double c) {
    const double product = x * c;
    return sum + product;
}

VQOPS_HOST_DEVICE double tree(const double* p) {
    return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
}

// The cost that cosine minimises: -x.c / |c|, 0 for a zero code, +inf for an overflowed quotient.
VQOPS_HOST_DEVICE double cosine_cost(double x_dot_c, double c_dot_c) {
    const double norm = std::sqrt(c_dot_c);
    if (!(norm > 0)) return 0;
    const double cost = -x_dot_c / norm;
    return cost == cost ? cost : HUGE_VAL;
}

// The distance that nearest_topk returns for a cost.
VQOPS_HOST_DEVICE double cosine_distance(double cost, double x_dot_x) {
    const double norm = std::sqrt(x_dot_x);
    return 1 + (norm > 0 ? cost / norm : 0);
}

// The tie rule: less cost first, then the lower index. A cost is never NaN; index -1 stands for no code.
VQOPS_HOST_DEVICE bool before(double cost, int64_t index, double other_cost, int64_t other_index) {
    if (index < 0 || other_index < 0) return index >= 0;
    return cost < other_cost || (cost == other_cost && index < other_index);
}

VQOPS_HOST_DEVICE double divisor(double square) {
    const double norm = std::sqrt(square);
    return norm > kSmallestNorm ? norm : kSmallestNorm;
}

}  // namespace vqops
