// Sums of the rows that have each code. Bytes: 4 D N read (float32), 8 N of indices, 24 N and two passes of the sort.
#pragma once

#include "runs.h"

namespace vqops::cuda {

template <class T>
struct CodeSums {
    Typed<T> x;            // [H, N, D]
    Rows weight;           // [H, N]; data null without
    Indices indices;
    Sorted sorted;
    SumsOut<float> out;

    // What a row adds to a column of its code.
    struct Value {
        Typed<T> x;
        Rows weight;
        int64_t D;

        VQOPS_HOST_DEVICE int code(int64_t, int64_t, int64_t) const { return 0; }
        VQOPS_HOST_DEVICE float at(int64_t, int64_t h, int64_t n, int64_t column, int) const {
            const float w = weight.data ? float(weight.at(weight.offset(h, n), 0)) : 1;
            if (column == D) return w;
            const float value = float(x.at(x.offset(h, n), column));
            return weight.data ? value * w : value;
        }
    };

    template <class Device>
    void run(const Device& device) const {
        sort_by_code(device, sorted, indices);
        device.launch(SumRuns<Value, float>{sorted, out, {x, weight, out.D}});
        device.launch(Fold<float>{sorted, out});
    }
};

}  // namespace vqops::cuda
