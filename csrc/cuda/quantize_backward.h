// The backward of a quantizer's bottleneck.
//
// RowGradient: 32 neighbouring threads per row (8 where D <= 32), columns dealt out among them, sums by shuffles.
//   registers     the row's three to six dot products; its columns are read again for each pass, from the first cache
//   bytes         x and the incoming gradient once from memory, the code from L2; grad_x written once
// No rotation matrix is built. The codebook's gradient is a sum by code, added up as code_sums does it (code_sums.h).
#pragma once

#include "../contract.h"
#include "../distance.h"
#include "code_sums.h"

namespace vqops::cuda {

template <class T, class Real>
struct BackwardInputs {
    int64_t H, N, D;
    Typed<T> x;          // [H, N, D]
    Typed<T> quantized;  // gradient of quantized [H, N, D]; data null where nothing came
    Rows error;          // gradient of error [H, N]; data null where nothing came
    Rows codebook;       // [H, K, D]
    Indices indices;
    RowMask mask;
    Passing passing;
    bool units;  // x stands for x / max(|x|, 1e-6), and the gradient goes through the division
    double codebook_error_scale;
};

// State of a row that its passes share.
template <class Real>
struct RowState {
    int64_t h, n, k;
    bool kept;            // neither masked nor beyond the last row
    bool turned;          // by the rotation
    Real norm;            // max(|x|, 1e-6), which a unit is divided by
    Real x_norm, q_norm;  // of the row as quantized, and of its code
    Real scale;           // |q| / |x|, at most kLargestScale
    Real along_w, along_v;
    Real error;  // gradient of the row's error
};

template <class T, class Real, int L>
struct RowGradient {
    static constexpr int kThreads = 256, kRows = kThreads / L;
    struct Shared {};
    BackwardInputs<T, Real> in;
    T* grad_x;      // [H, N, D], or null for
    Real* inverse;  // [H, N], 1 / max(|x|, 1e-6), which the codebook's gradient takes for units

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (in.H * in.N + kRows - 1) / kRows; }

    VQOPS_HOST_DEVICE Real start(const RowState<Real>& row, int64_t i) const {
        const Real value = Real(in.x.at(in.x.offset(row.h, row.n), i));
        return in.units ? value / row.norm : value;
    }
    VQOPS_HOST_DEVICE Real code(const RowState<Real>& row, int64_t i) const {
        return row.k < 0 ? Real(NAN) : Real(in.codebook.at(in.codebook.offset(row.h, row.k), i));
    }
    VQOPS_HOST_DEVICE Real incoming(const RowState<Real>& row, int64_t i) const {
        return Real(in.quantized.at(in.quantized.offset(row.h, row.n), i));
    }

    // u + v of the rotation that takes u = x / |x| to v = q / |q| (arXiv 2410.06424, section 4.2).
    VQOPS_HOST_DEVICE Real u(const RowState<Real>& row, int64_t i) const { return start(row, i) / row.x_norm; }
    VQOPS_HOST_DEVICE Real v(const RowState<Real>& row, int64_t i) const { return code(row, i) / row.q_norm; }

    // The gradient of start(row, i).
    VQOPS_HOST_DEVICE Real outgoing(const RowState<Real>& row, int64_t i) const {
        Real g = 0;
        if (in.quantized.data && in.passing != Passing::none) {
            g = incoming(row, i);
            if (row.turned) g = (g - row.along_w * (u(row, i) + v(row, i)) + row.along_v * u(row, i)) * row.scale;
        }
        return in.error.data ? g + 2 * (start(row, i) - code(row, i)) * row.error : g;
    }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        const bool rotation = grad_x && in.quantized.data && in.passing == Passing::rotation;
        const Real smallest = Real(kSmallestNorm);
        auto rows = block.template registers<RowState<Real>>();
        auto a = block.template registers<Real>(), b = block.template registers<Real>(),
             c = block.template registers<Real>();
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            const int64_t i = block.index * kRows + t / L;
            const bool exists = i < in.H * in.N;
            row.h = exists ? uint32_t(i) / uint32_t(in.N) : 0, row.n = exists ? i - row.h * in.N : 0;
            row.kept = exists && in.mask.keeps(row.h, row.n);
            row.k = row.kept ? in.indices.at(row.h, row.n) : -1;
            row.error = row.kept && in.error.data ? Real(in.error.at(in.error.offset(row.h, row.n), 0)) : 0;
            a[t] = b[t] = 0;
            row.norm = 1;
            for (int64_t d = t % L; d < in.D && row.kept; d += L) {
                if (in.units || rotation) {
                    const Real x = Real(in.x.at(in.x.offset(row.h, row.n), d));
                    a[t] += x * x;
                }
                if (rotation) b[t] += code(row, d) * code(row, d);
            }
        });
        block.template shuffle_sum<L>(a);
        block.template shuffle_sum<L>(b);
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            const Real length = std::sqrt(a[t]);
            row.norm = length > smallest || length != length ? length : smallest;
            row.x_norm = in.units ? length / row.norm : length;
            if (row.x_norm < smallest) row.x_norm = smallest;
            row.q_norm = std::sqrt(b[t]);
            row.scale = row.q_norm / row.x_norm;
            if (row.scale > Real(kLargestScale)) row.scale = Real(kLargestScale);
            // A vector of length 0 has no direction. NaN is no length, and stays NaN.
            row.turned = rotation && !(length <= smallest || row.q_norm <= smallest);
            a[t] = b[t] = c[t] = 0;
            for (int64_t d = t % L; d < in.D && row.kept && row.turned; d += L) {
                const Real g = incoming(row, d), along = v(row, d), w = u(row, d) + along;
                a[t] += w * w, b[t] += w * g, c[t] += along * g;
            }
            if (inverse && row.kept && t % L == 0) inverse[row.h * in.N + row.n] = 1 / row.norm;
        });
        if (!grad_x) return;
        if (rotation) {
            block.template shuffle_sum<L>(a);
            block.template shuffle_sum<L>(b);
            block.template shuffle_sum<L>(c);
        }
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            const Real w_norm = std::sqrt(a[t]) < smallest ? smallest : std::sqrt(a[t]);
            row.along_w = 2 * b[t] / (w_norm * w_norm), row.along_v = 2 * c[t];
            a[t] = 0;
            for (int64_t d = t % L; d < in.D && row.kept && in.units; d += L) a[t] += start(row, d) * outgoing(row, d);
        });
        if (in.units) block.template shuffle_sum<L>(a);
        block.for_threads([&](int t) {
            const RowState<Real>& row = rows[t];
            if (block.index * kRows + t / L >= in.H * in.N) return;
            const Real along = row.norm > smallest ? a[t] : Real(0);
            for (int64_t d = t % L; d < in.D; d += L) {
                Real g = 0;
                if (row.kept) g = outgoing(row, d);
                if (row.kept && in.units) g = (g - along * start(row, d)) / row.norm;
                grad_x[(row.h * in.N + row.n) * in.D + d] = rounded<T>(g);
            }
        });
    }
};

// A row's share of the gradient of its code.
template <class T, class Real>
struct CodeGradient {
    struct Row {
        int64_t x, code;
        Real inverse, error;
    };
    BackwardInputs<T, Real> in;
    const Real* inverse;

    VQOPS_HOST_DEVICE Row row(int64_t row, int64_t h, int64_t n, int64_t k) const {
        return {in.x.offset(h, n), in.codebook.offset(h, k), in.units ? inverse[row] : Real(1),
                Real(in.error.at(in.error.offset(h, n), 0))};
    }
    VQOPS_HOST_DEVICE void read(const Row* rows, int64_t column, Real* values) const {
        VQOPS_UNROLL(8)
        for (int j = 0; j < kAhead; j++) values[j] = Real(in.x.at(rows[j].x, column)) * rows[j].inverse;
        in.codebook.with_type([&](const auto* codes) {
            VQOPS_UNROLL(8)
            for (int j = 0; j < kAhead; j++) {
                const Real code = Real(real(codes[rows[j].code + column * in.codebook.stride]));
                values[j] = 2 * (values[j] - code) * rows[j].error * Real(-in.codebook_error_scale);
            }
        });
    }
};

template <class Device, class T, class Real>
void gradient_of_rows(const Device& device, const BackwardInputs<T, Real>& in, T* grad_x, Real* inverse) {
    if (in.D <= 32) device.launch(RowGradient<T, Real, 8>{in, grad_x, inverse});
    else device.launch(RowGradient<T, Real, 32>{in, grad_x, inverse});
}

// grad_codebook [H, K, D]; `in.error` must be there. `inverse` [H, N] is workspace for units, else null.
template <class Device, class T, class Real>
void gradient_of_codes(const Device& device, const BackwardInputs<T, Real>& in, const Sums<Real>& sums, Real* inverse) {
    BackwardInputs<T, Real> all = in;  // the indices alone say which rows count
    all.mask.data = nullptr;
    if (in.units) gradient_of_rows(device, all, static_cast<T*>(nullptr), inverse);
    sum_rows(device, sums, CodeGradient<T, Real>{in, inverse});
}

}  // namespace vqops::cuda
