// The arithmetic that decides, in plain scalar form for any compiler and device: what float64 compares, who wins a tie,
// and how counts are smoothed. vqops/ops/reference.py is its specification. csrc/exact.h has the same distances in
// vectors for CPUs; tests/native/kernels.cpp holds them equal bit for bit.
//
// Multiply and add round separately: build with -ffp-contract=off, CUDA with -fmad=false.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define VQOPS_HOST_DEVICE __host__ __device__
#else
#define VQOPS_HOST_DEVICE
#endif

namespace vqops {

// Eight partial sums over i = j mod 8, ascending, and their tree.
struct PartialSums {
    double p[8] = {};

    VQOPS_HOST_DEVICE void add(int64_t i, double value) { p[i % 8] += value; }
    VQOPS_HOST_DEVICE double total() const {
        return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
    }
};

// |x - c|^2 of D values of any two floating types.
template <class X, class C>
VQOPS_HOST_DEVICE double exact_distance(const X* x, const C* c, int64_t D) {
    PartialSums sums;
    for (int64_t i = 0; i < D; i++) {
        const double e = double(x[i]) - double(c[i]);
        sums.add(i, e * e);
    }
    return sums.total();
}

template <class X, class C>
VQOPS_HOST_DEVICE double exact_product(const X* x, const C* c, int64_t D) {
    PartialSums sums;
    for (int64_t i = 0; i < D; i++) sums.add(i, double(x[i]) * double(c[i]));
    return sums.total();
}

// What the search for the largest cosine minimises, from x.c and c.c: -x.c / |c|, 0 for a zero code, and +inf for a
// quotient that overflowed to NaN.
VQOPS_HOST_DEVICE inline double cosine_cost(double product, double square) {
    const double norm = std::sqrt(square);
    if (!(norm > 0)) return 0;
    const double cost = -product / norm;
    return cost == cost ? cost : double(INFINITY);
}

// Whether one code is nearer than another: by cost, equal costs by index.
VQOPS_HOST_DEVICE inline bool is_nearer(double cost, int64_t index, double other_cost, int64_t other_index) {
    return cost < other_cost || (cost == other_cost && index < other_index);
}

// The count that a code's average is divided by: Laplace smoothing that keeps the total.
VQOPS_HOST_DEVICE inline float smoothed_count(float count, float total, float eps, int64_t K) {
    return (count + eps) / (total + float(K) * eps) * total;
}

}  // namespace vqops
