// What the parts of the program share: a case, plain loops that say what is right, and a count of what is not.
#pragma once

#include <cmath>
#include <cstdio>
#include <thread>

#include "../../../csrc/cpu/search.h"
#include "../../../csrc/distance.h"

namespace vqops {

inline int failures = 0;

inline void expect(bool holds, const char* what, const char* name, int64_t where) {
    if (holds) return;
    std::printf("%s: %s at %lld\n", name, what, static_cast<long long>(where));
    failures++;
}

inline Parallel two_threads() {
    return {2, [](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
                const int64_t half = (size + 1) / 2;
                std::thread other([&] { if (half < size) body(half, size); });
                body(0, half);
                other.join();
            }};
}

// The arithmetic of csrc/distance.h over a vector.
inline double exact_distance(const float* x, const float* c, int64_t D) {
    double p[kLanes] = {};
    for (int64_t i = 0; i < D; i++) p[i % kLanes] = add_square(p[i % kLanes], x[i], c[i]);
    return tree(p);
}

inline double exact_product(const float* x, const float* c, int64_t D) {
    double p[kLanes] = {};
    for (int64_t i = 0; i < D; i++) p[i % kLanes] = add_product(p[i % kLanes], x[i], c[i]);
    return tree(p);
}

inline double cost(const float* x, const float* c, int64_t D, bool cosine) {
    return cosine ? cosine_cost(exact_product(x, c, D), exact_product(c, c, D)) : exact_distance(x, c, D);
}

inline bool finite(const float* row, int64_t D) {
    for (int64_t i = 0; i < D; i++)
        if (!std::isfinite(row[i])) return false;
    return true;
}

struct Case {
    const char* name;
    int64_t H, N, K, D;
    float x_scale, c_scale, offset;
    int repeat;      // each code stands this many times, all but the first moved by
    float spread;    // this much
    bool specials;   // NaN, Inf, huge, zero and denormal rows and codes
};

// The levels of a residual quantizer (levels.cpp), with this codebook and preparation.
void levels(const Case& test, const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
            const void* memory, const Parallel& parallel);

// In files of their names; models() are those of bfloat16 instructions.
void bounds();
void averages();
void sums();  // averages.cpp
void models();

// The float mode of the threads that call (modes.cpp).
void modes();

}  // namespace vqops
