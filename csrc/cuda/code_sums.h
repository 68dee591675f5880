// Sums of the rows that have each code, by sums.h. Never run on a GPU.
// Bytes: 4 D N read (float32), 8 N of indices, and what the order takes.
#pragma once

#include "sums.h"

namespace vqops::cuda {

// What a row adds to a column of its code.
template <class T>
struct WeightedRow {
    struct alignas(16) Row {
        int64_t x;
        float weight;
    };
    Typed<T> x;   // [H, N, D]
    Rows weight;  // [H, N]; data null without
    int64_t D;

    VQOPS_HOST_DEVICE Row row(int64_t, int64_t h, int64_t n, int64_t) const {
        return {x.offset(h, n), weight.data ? float(weight.at(weight.offset(h, n), 0)) : 1};
    }
    VQOPS_HOST_DEVICE void read(const Row* rows, int64_t column, float* values) const {
        const T* const data = x.data + (column < D ? column : 0) * x.stride;
        VQOPS_UNROLL(8)
        for (int j = 0; j < kAhead; j++) {
            const float value = float(real(data[rows[j].x]));
            values[j] = (column < D ? value : 1) * rows[j].weight;
        }
    }
};

template <class Device, class T>
void code_sums(const Device& device, const Typed<T>& x, const Rows& weight, const Sums<float>& sums) {
    sum_rows(device, sums, WeightedRow<T>{x, weight, sums.D});
}

}  // namespace vqops::cuda
