// Rows on their way through the levels: what is left of them, and the sum of their codes.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "residual.h"
#include "row_buffer.h"

namespace vqops {

// rest = T(double(rest) - double(code)), which between floats is the subtraction of floats.
template <class T>
static inline void subtract(T* rest, const double* code, int64_t D) {
    for (int64_t i = 0; i < D; i++) rest[i] = T(double(rest[i]) - code[i]);
}

static inline void subtract(float* __restrict rest, const float* __restrict code, int64_t D) {
    for (int64_t i = 0; i < D; i++) rest[i] -= code[i];
}

// The same of code k of a head; `buffer` has room for a row.
template <class T>
static inline void subtract_code(T* rest, const Rows& codebook, int64_t k, int64_t D, double* buffer) {
    if (std::is_same_v<T, float> && codebook.has_float_rows())
        return subtract(reinterpret_cast<float*>(rest), codebook.floats(0, k), D);
    read_row(codebook, 0, k, D, buffer);
    subtract(rest, buffer, D);
}

// Rows of one thread. T: float, or double for float64 rows.
template <class T>
class LevelRows {
public:
    LevelRows(const ResidualInputs& in, const ResidualResult& result, int64_t rows)
        : in_(in), result_(result), D(in.D), rest_(new T[rows * D]), kept_(new bool[rows]),
          chosen_(new int64_t[rows]), start_(D), code_(D) {
        if (in.x.dtype != in.real()) wide_.reset(new T[rows * D]);
    }

    Rows as_rows() const { return {rest_.get(), in_.real(), 0, D, 1}; }
    RowMask mask() const { return {kept_.get(), 0, 1}; }
    int64_t* indices() { return chosen_.get(); }

    // Rows [begin, end) of head h, at places 0, 1, ...
    void read(int64_t h, int64_t begin, int64_t end) {
        h_ = h, begin_ = begin, count_ = end - begin;
        for (int64_t i = 0; i < count_; i++) {
            kept_[i] = in_.mask.keeps(h, begin + i);
            read_row(in_.x, h, begin + i, D, &rest_[i * D]);
        }
        total_ = wide_ ? wide_.get() : static_cast<T*>(result_.quantized) + (h * in_.N + begin) * D;
        std::fill_n(total_, count_ * D, T(0));
    }

    // Takes off each row the code that `indices()` says, and writes that and its error. A row without a code is NaN.
    void take_off(const Rows& codebook, int64_t level, double* errors) {
        const bool floats = std::is_same_v<T, float> && !in_.units && codebook.has_float_rows();
        int64_t* out = result_.indices + (h_ * in_.N + begin_) * in_.Q() + level;
        for (int64_t i = 0; i < count_; i++, out += in_.Q()) {
            const int64_t k = *out = chosen_[i];
            T *rest = &rest_[i * D], *total = &total_[i * D];
            if (k < 0) {
                errors[i] = kept_[i] ? NAN : 0;
                if (kept_[i]) std::fill_n(rest, D, T(NAN)), std::fill_n(total, D, T(NAN));
            } else if (floats) {
                errors[i] = set_.take_off(reinterpret_cast<float*>(rest), reinterpret_cast<float*>(total),
                                          codebook.floats(0, k), D);
            } else {
                read_row(codebook, 0, k, D, code_.data);
                std::copy(rest, rest + D, start_.data);
                if (in_.units) start_.to_unit(D);
                errors[i] = set_.exact_cost(start_.data, code_.data, code_.padded, false);
                for (int64_t j = 0; j < D; j++) total[j] += T(code_.data[j]);
                subtract(rest, code_.data, D);
            }
        }
    }

    // The sums of codes, as x is.
    void write() {
        for (int64_t i = 0; wide_ && i < count_; i++)
            write_row(result_.quantized, in_.x.dtype, h_ * in_.N + begin_ + i, D, &wide_[i * D]);
    }

private:
    const ResidualInputs& in_;
    const ResidualResult& result_;
    const Instructions& set_ = instructions();
    const int64_t D;
    int64_t h_ = 0, begin_ = 0, count_ = 0;
    std::unique_ptr<T[]> rest_, wide_;
    T* total_ = nullptr;  // in place, or wider than x
    std::unique_ptr<bool[]> kept_;
    std::unique_ptr<int64_t[]> chosen_;
    AlignedRow start_, code_;
};

// What is left of all rows of a head, level after level, in a copy that the first level makes. Rows without a code are
// left out: no later level has one for them.
template <class T>
class Rest {
public:
    // Rows [1, N, D].
    Rest(const Rows& x, DType real, int64_t N, int64_t D) : rows_(x), real_(real), N_(N), D_(D) {}

    const Rows& rows() const { return rows_; }

    void take_off(const Rows& codebook, const Indices& indices, const Parallel& parallel) {
        const Rows before = rows_;
        if (!values_) values_.reset(new T[N_ * D_]), rows_ = {values_.get(), real_, 0, D_, 1};
        const bool copied = before.data == rows_.data;
        parallel.over(N_, [&](int64_t begin, int64_t end) {
            const DefaultFloatMode mode;
            std::vector<double> code(D_);
            for (int64_t n = begin; n < end; n++) {
                const int64_t k = indices.given(0, n);
                if (k < 0) continue;
                T* rest = &values_[n * D_];
                if (!copied) read_row(before, 0, n, D_, rest);
                subtract_code(rest, codebook, k, D_, code.data());
            }
        });
    }

private:
    Rows rows_;
    const DType real_;
    const int64_t N_, D_;
    std::unique_ptr<T[]> values_;
};

}  // namespace vqops
