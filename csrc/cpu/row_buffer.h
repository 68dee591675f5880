// One row in float64, aligned and padded with zeros for the exact arithmetic.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#include "instructions.h"

namespace vqops {

struct AlignedRow {
    explicit AlignedRow(int64_t D) : padded((D + 7) / 8 * 8) {
        data = static_cast<double*>(::operator new(size_t(8 * padded), std::align_val_t(64)));
        std::fill(data, data + padded, 0.0);
    }
    AlignedRow(const AlignedRow&) = delete;
    AlignedRow& operator=(const AlignedRow&) = delete;
    ~AlignedRow() { ::operator delete(data, std::align_val_t(64)); }

    double dot(const AlignedRow& other) const { return instructions().dot(data, other.data, padded); }

    // 0 * Inf and 0 * NaN are NaN. Eight sums, so that no addition waits for the one before.
    bool finite() const {
        double zero[8] = {};
        for (int64_t i = 0; i < padded; i += 8)
            for (int j = 0; j < 8; j++) zero[j] += 0 * data[i + j];
        return ((zero[0] + zero[1]) + (zero[2] + zero[3])) + ((zero[4] + zero[5]) + (zero[6] + zero[7])) == 0;
    }

    int64_t padded;
    double* data;
};

}  // namespace vqops
