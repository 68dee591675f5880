// The backward of residual quantization.
//
// LevelsGradient: 32 neighbouring threads per row (8 where D <= 32) take it through all levels, columns dealt out among
// them, each of which one thread alone touches.
//   shared        what is left of the rows and the sums of their gradients, and those of their codes where the gradient
//                 is turned once; beyond 96 KB in memory
//   bytes         x and the incoming gradient once from memory, per level a code from L2; grad_x written once
// The codebooks' gradients are sums by code of the rows as each level found them (quantize_backward.h), which TakeOff
// (residual.h) leads from level to level.
#pragma once

#include "quantize_backward.h"
#include "residual.h"

namespace vqops::cuda {

constexpr int kMostLevels = 64;
constexpr size_t kMostShared = 96 * 1024;  // of the 99 KB that every GPU gives a block

template <class T>
struct LevelsInputs {
    int64_t H, N, D, Q;
    Typed<T> x;                      // [H, N, D]
    Typed<T> quantized;              // gradient of quantized [H, N, D]; data null where nothing came
    Rows error;                      // gradient of error [H, Q]; data null where nothing came
    Rows codebooks;                  // [H, sum K, D], a level behind the other
    int64_t first[kMostLevels + 1];  // code of each level
    const int64_t* indices;          // [H, N, Q]
    RowMask mask;
    Running running;
    Passing passing;
    bool per_level;  // the gradient of quantized passes once a level, else once
    bool units;

    VQOPS_HOST_DEVICE bool has_passing() const { return quantized.data && passing != Passing::none; }
    VQOPS_HOST_DEVICE bool turns_sum() const { return has_passing() && passing == Passing::rotation && !per_level; }
    VQOPS_HOST_DEVICE Indices of_level(int64_t l) const { return {indices + l, N * Q, Q, first[l + 1] - first[l]}; }
};

// A row and its code as a level sees them; the row as given and the sum of its codes where the gradient passes once.
template <class T, class Real>
struct LevelColumns {
    typedef typename ErrorOf<T>::type Rest;
    const LevelsInputs<T>& in;
    const Rest *rest, *total;
    bool summed;

    VQOPS_HOST_DEVICE Real x(int64_t place, int64_t i) const { return Real(rest[place + i]); }
    VQOPS_HOST_DEVICE Real code(int64_t place, int64_t i) const {
        return summed ? Real(total[place + i]) : Real(in.codebooks.at(place, i));
    }
    VQOPS_HOST_DEVICE Real incoming(int64_t place, int64_t i) const { return Real(in.quantized.at(place, i)); }
};

template <class T, class Real, int L>
struct LevelsGradient {
    typedef typename ErrorOf<T>::type Rest;
    static constexpr int kThreads = 256, kRows = kThreads / L;
    struct Shared {};
    LevelsInputs<T> in;
    T* grad_x;  // [H, N, D]
    char* memory = nullptr;  // for all rows what a block shares else

    // Rows of a warp lie in other banks.
    VQOPS_HOST_DEVICE int64_t stride() const { return L == 32 ? in.D : in.D <= 8 ? 8 : 40; }
    VQOPS_HOST_DEVICE size_t bytes(int64_t rows) const {
        return size_t(rows * stride()) * (sizeof(Real) + sizeof(Rest) * (in.turns_sum() ? 2 : 1));
    }
    size_t memory_bytes() const { return bytes(kRows) > kMostShared ? bytes(in.H * in.N) : 0; }
    size_t shared_bytes() const { return memory_bytes() ? 0 : bytes(kRows); }
    int64_t blocks() const { return (in.H * in.N + kRows - 1) / kRows; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t held = memory ? in.H * in.N : kRows;
        Real* const sum = reinterpret_cast<Real*>(memory ? memory : reinterpret_cast<char*>(&shared));
        Rest* const rest = reinterpret_cast<Rest*>(sum + held * stride());
        Rest* const total = in.turns_sum() ? rest + held * stride() : nullptr;
        const int64_t running = !in.running.levels || *in.running.levels > in.Q ? in.Q : *in.running.levels;
        const bool passes = in.has_passing(), errors = in.error.data, once = passes && !in.per_level;
        const bool rotation = passes && in.passing == Passing::rotation;
        const bool moves = errors || rotation || in.units;  // or the codes say nothing
        const int64_t levels = (moves || (passes && in.per_level)) && running > 0 ? running : 0;
        const auto row_of = [&](int t) { return block.index * kRows + t / L; };
        const auto place_of = [&](int t) { return (memory ? row_of(t) : t / L) * stride(); };
        const auto head_of = [&](int t) { return int64_t(uint32_t(row_of(t)) / uint32_t(in.N)); };
        const auto take_x = [&](int t, int64_t d) {
            const int64_t h = head_of(t);
            rest[place_of(t) + d] = Rest(in.x.at(in.x.offset(h, row_of(t) - h * in.N), d));
        };
        auto rows = block.template registers<RowState<Real>>();
        block.for_threads([&](int t) {
            RowState<Real>& row = rows[t];
            const bool exists = row_of(t) < in.H * in.N;
            const int64_t h = exists ? head_of(t) : 0, n = exists ? row_of(t) - h * in.N : 0;
            row.kept = exists && in.mask.keeps(h, n);
            row.x = place_of(t), row.incoming = in.quantized.offset(h, n);
            for (int64_t d = t % L; d < in.D && row.kept; d += L) {
                take_x(t, d);
                sum[row.x + d] = 0;
                if (total) total[row.x + d] = 0;
            }
        });
        for (int64_t l = 0; l < levels + once; l++) {
            const bool summed = l == levels, here = summed || in.per_level;
            const RowPasses<LevelColumns<T, Real>, Real, L> gradient = {
                {in, rest, total, summed}, in.D, in.units && !summed, passes && here, rotation && here,
                errors && !summed};
            block.for_threads([&](int t) {
                RowState<Real>& row = rows[t];
                row.turned = false, row.code = row.x, row.error = 0;
                for (int64_t d = t % L; d < in.D && row.kept && summed && rotation; d += L) take_x(t, d);
                if (summed || !row.kept) return;
                const int64_t h = head_of(t), k = in.of_level(l).at(h, row_of(t) - h * in.N);
                row.code = k < 0 ? -1 : in.codebooks.offset(h, in.first[l] + k);
                if (errors) row.error = Real(in.error.at(in.error.offset(h, l), 0));
            });
            if (gradient.units || gradient.rotation) {
                gradient.lengths(block, rows);
                gradient.directions(block, rows);
            }
            block.for_threads([&](int t) {
                const RowState<Real>& row = rows[t];
                for (int64_t d = t % L; d < in.D && row.kept; d += L) {
                    sum[row.x + d] += gradient.of_x(row, d);
                    if (summed || !moves) continue;
                    const Real code = gradient.code(row, d);
                    if (total) total[row.x + d] += Rest(code);
                    rest[row.x + d] = Rest(double(rest[row.x + d]) - double(code));
                }
            });
        }
        block.for_threads([&](int t) {
            if (row_of(t) >= in.H * in.N) return;
            for (int64_t d = t % L; d < in.D; d += L)
                grad_x[row_of(t) * in.D + d] = rounded<T>(rows[t].kept ? sum[rows[t].x + d] : Real(0));
        });
    }
};

// `allocate(bytes)` gives workspace that lasts as long as the launch.
template <class Real, class Device, class T, class Allocate>
void gradient_of_levels(const Device& device, const LevelsInputs<T>& in, T* grad_x, const Allocate& allocate) {
    const auto launch = [&](auto kernel) {
        if (kernel.memory_bytes()) kernel.memory = allocate(kernel.memory_bytes());
        device.launch(kernel);
    };
    if (in.D <= 32) launch(LevelsGradient<T, Real, 8>{in, grad_x});
    else launch(LevelsGradient<T, Real, 32>{in, grad_x});
}

// The gradients of one level's codes, [H, K, D]; then, unless it is the last, `rest` [H, N, D] is what it leaves. The
// first level takes in.x. `inverse` [H, N] is workspace for units, else null.
template <class Device, class Rest, class Real>
void gradient_of_level(const Device& device, const LevelsInputs<Rest>& in, int64_t level, double codebook_error_scale,
                       const Sums<Real>& sums, Real* inverse, Rest* rest) {
    const Typed<Rest> left = level == 0 ? in.x : Typed<Rest>{rest, in.N * in.D, in.D, 1};
    const Rows codebook = in.codebooks.from(0, in.first[level]);
    Rows error = in.error.from(0, level);
    error.row_stride = 0;
    gradient_of_codes(device,
                      BackwardInputs<Rest, Real>{in.H, in.N, in.D, left, {}, error, codebook, in.of_level(level), {},
                                                 Passing::none, in.units, codebook_error_scale},
                      sums, inverse);
    if (level == in.Q - 1) return;
    TakeOff<Rest> take_off = {{in.H, in.N}, in.D, in.Q, level, in.x, codebook, in.of_level(level), in.mask, in.running};
    take_off.rest = rest;
    device.launch(take_off);
}

}  // namespace vqops::cuda
