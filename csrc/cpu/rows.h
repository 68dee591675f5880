// Rows read as float or double, and written.
#pragma once

#include "../tensors.h"

namespace vqops {

// Rows side by side have a loop of their own, so that it is compiled to vectors.
template <class T>
static inline void read_row(const Rows& rows, int64_t h, int64_t n, int64_t D, T* out) {
    const int64_t start = rows.offset(h, n), stride = rows.stride;
    rows.with_type([=](const auto* values) {
        const auto* p = values + start;
        if (stride == 1)
            for (int64_t i = 0; i < D; i++) out[i] = T(real(p[i]));
        else
            for (int64_t i = 0; i < D; i++) out[i] = T(real(p[i * stride]));
    });
}

// The value of a tensor [H, N] or [H, N, 1].
template <class T>
static inline T read_value(const Rows& rows, int64_t h, int64_t n) {
    return T(rows.at(rows.offset(h, n), 0));
}

// Writes a contiguous row of the dtype; `row` counts rows of D from `data`.
template <class T>
static inline void write_row(void* data, DType dtype, int64_t row, int64_t D, const T* values) {
    with_type(dtype, [=](auto typed) {
        using Stored = decltype(typed);
        Stored* const p = static_cast<Stored*>(data) + row * D;
        for (int64_t i = 0; i < D; i++) p[i] = rounded<Stored>(values[i]);
    });
}

// A row as float: in place where it lies so in memory, else copied to `buffer`. Not for float64.
static inline const float* float_row(const Rows& rows, int64_t h, int64_t n, int64_t D, float* buffer) {
    if (rows.has_float_rows()) return rows.floats(h, n);
    read_row(rows, h, n, D, buffer);
    return buffer;
}

}  // namespace vqops
