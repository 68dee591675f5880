// Memory of a thread: whole cache lines; one row in float64, aligned and padded with zeros for the exact arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "../distance.h"
#include "instructions.h"

namespace vqops {

// Aligned by hand: an aligned allocation costs a search of few rows a tenth of its time.
inline void* at_line(void* memory) {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// Not set to anything.
struct CacheLines {
    explicit CacheLines(int64_t bytes) : held_(new char[bytes + 63]) {
        data = static_cast<char*>(at_line(held_.get()));
    }

    char* data;

private:
    std::unique_ptr<char[]> held_;
};

struct AlignedRow {
    explicit AlignedRow(int64_t D) : padded((D + 7) / 8 * 8), held_(new double[padded + 7]()) {
        data = static_cast<double*>(at_line(held_.get()));
    }

    double dot(const AlignedRow& other) const { return instructions().dot(data, other.data, padded); }

    // x / max(|x|, 1e-6), in place; the padding stays zero whatever x is.
    void to_unit(int64_t D) {
        const double norm = std::max(std::sqrt(dot(*this)), kSmallestNorm);
        for (int64_t i = 0; i < D; i++) data[i] /= norm;
    }

    // 0 * Inf and 0 * NaN are NaN. Eight sums, so that no addition waits for the one before.
    bool finite() const {
        double zero[8] = {};
        for (int64_t i = 0; i < padded; i += 8)
            for (int j = 0; j < 8; j++) zero[j] += 0 * data[i + j];
        return ((zero[0] + zero[1]) + (zero[2] + zero[3])) + ((zero[4] + zero[5]) + (zero[6] + zero[7])) == 0;
    }

    int64_t padded;
    double* data;

private:
    std::unique_ptr<double[]> held_;
};

}  // namespace vqops
