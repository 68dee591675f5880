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

    // 0 * Inf and 0 * NaN are NaN.
    bool finite() const {
        double zero = 0;
        for (int64_t i = 0; i < padded; i++) zero += 0 * data[i];
        return zero == 0;
    }

    int64_t padded;
    double* data;
};

}  // namespace vqops
