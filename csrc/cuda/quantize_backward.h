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
    int64_t x, code, incoming;  // where its columns are; code -1: it has none
    bool kept;                  // neither masked nor beyond the last row
    bool turned;                // by the rotation
    Real norm;                  // max(|x|, 1e-6), which a unit is divided by
    Real x_norm, q_norm;        // of the row as quantized, and of its code
    Real scale;                 // |q| / |x|, at most kLargestScale
    Real along_w, along_v;
    Real along;  // of the gradient of a unit, along it
    Real error;  // gradient of the row's error
};

// The passes over rows and their codes that give the gradient of x, by L neighbouring threads per row. `at` has the
// columns: at.x(place, i), at.code(place, i), at.incoming(place, i).
template <class At, class Real, int L>
struct RowPasses {
    At at;
    int64_t D;
    bool units, passes, rotation, errors;  // passes: the gradient of quantized does; rotation: turned

    VQOPS_HOST_DEVICE Real start(const RowState<Real>& row, int64_t i) const {
        const Real value = at.x(row.x, i);
        return units ? value / row.norm : value;
    }
    VQOPS_HOST_DEVICE Real code(const RowState<Real>& row, int64_t i) const {
        return row.code < 0 ? Real(NAN) : at.code(row.code, i);
    }

    // u + v of the rotation that takes u = x / |x| to v = q / |q| (arXiv 2410.06424, section 4.2).
    VQOPS_HOST_DEVICE Real u(const RowState<Real>& row, int64_t i) const { return start(row, i) / row.x_norm; }
    VQOPS_HOST_DEVICE Real v(const RowState<Real>& row, int64_t i) const { return code(row, i) / row.q_norm; }

    // The gradient of start(row, i).
    VQOPS_HOST_DEVICE Real of_start(const RowState<Real>& row, int64_t i) const {
        Real g = 0;
        if (passes) {
            g = at.incoming(row.incoming, i);
            if (row.turned) g = (g - row.along_w * (u(row, i) + v(row, i)) + row.along_v * u(row, i)) * row.scale;
        }
        return errors ? g + 2 * (start(row, i) - code(row, i)) * row.error : g;
    }

    // That of x, of a row that is kept.
    VQOPS_HOST_DEVICE Real of_x(const RowState<Real>& row, int64_t i) const {
        const Real g = of_start(row, i);
        return units ? (g - row.along * start(row, i)) / row.norm : g;
    }

    // Lengths of rows and codes.
    template <class Block, class States>
    VQOPS_HOST_DEVICE void lengths(Block& block, States& rows) const {
        const Real smallest = Real(kSmallestNorm);
        auto a = block.template registers<Real>(), b = block.template registers<Real>();
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            a[t] = b[t] = 0;
            for (int64_t d = t % L; d < D && row.kept; d += L) {
                if (units || rotation) {
                    const Real x = at.x(row.x, d);
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
            row.x_norm = units ? length / row.norm : length;
            if (row.x_norm < smallest) row.x_norm = smallest;
            row.q_norm = std::sqrt(b[t]);
            row.scale = row.q_norm / row.x_norm;
            if (row.scale > Real(kLargestScale)) row.scale = Real(kLargestScale);
            // A vector of length 0 has no direction. NaN is no length, and stays NaN.
            row.turned = rotation && !(length <= smallest || row.q_norm <= smallest);
        });
    }

    // What of_x takes, after lengths().
    template <class Block, class States>
    VQOPS_HOST_DEVICE void directions(Block& block, States& rows) const {
        const Real smallest = Real(kSmallestNorm);
        auto a = block.template registers<Real>(), b = block.template registers<Real>(),
             c = block.template registers<Real>();
        block.for_threads([&](int t) {
            const RowState<Real>& row = rows[t];
            a[t] = b[t] = c[t] = 0;
            for (int64_t d = t % L; d < D && row.kept && row.turned; d += L) {
                const Real g = at.incoming(row.incoming, d), along = v(row, d), w = u(row, d) + along;
                a[t] += w * w, b[t] += w * g, c[t] += along * g;
            }
        });
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
            for (int64_t d = t % L; d < D && row.kept && units; d += L) a[t] += start(row, d) * of_start(row, d);
        });
        if (units) block.template shuffle_sum<L>(a);
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            row.along = row.norm > smallest ? a[t] : Real(0);
        });
    }
};

template <class T, class Real>
struct GivenColumns {
    const BackwardInputs<T, Real>& in;

    VQOPS_HOST_DEVICE Real x(int64_t place, int64_t i) const { return Real(in.x.at(place, i)); }
    VQOPS_HOST_DEVICE Real code(int64_t place, int64_t i) const { return Real(in.codebook.at(place, i)); }
    VQOPS_HOST_DEVICE Real incoming(int64_t place, int64_t i) const { return Real(in.quantized.at(place, i)); }
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

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        const bool passes = in.quantized.data && in.passing != Passing::none, errors = in.error.data;
        const bool rotation = grad_x && passes && in.passing == Passing::rotation;
        const RowPasses<GivenColumns<T, Real>, Real, L> gradient = {{in}, in.D, in.units, passes, rotation, errors};
        const auto row_of = [&](int t) { return block.index * kRows + t / L; };
        auto rows = block.template registers<RowState<Real>>();
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            const bool exists = row_of(t) < in.H * in.N;
            const int64_t h = exists ? uint32_t(row_of(t)) / uint32_t(in.N) : 0, n = exists ? row_of(t) - h * in.N : 0;
            row.kept = exists && in.mask.keeps(h, n);
            const int64_t k = row.kept ? in.indices.at(h, n) : -1;
            row.x = in.x.offset(h, n), row.incoming = in.quantized.offset(h, n);
            row.code = k < 0 ? -1 : in.codebook.offset(h, k);
            row.error = row.kept && in.error.data ? Real(in.error.at(in.error.offset(h, n), 0)) : 0;
        });
        gradient.lengths(block, rows);
        block.for_threads([&](int t) {
            if (inverse && rows[t].kept && t % L == 0) inverse[row_of(t)] = 1 / rows[t].norm;
        });
        if (!grad_x) return;
        gradient.directions(block, rows);
        block.for_threads([&](int t) {
            const RowState<Real>& row = rows[t];
            if (row_of(t) >= in.H * in.N) return;
            for (int64_t d = t % L; d < in.D; d += L)
                grad_x[row_of(t) * in.D + d] = rounded<T>(row.kept ? gradient.of_x(row, d) : Real(0));
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
