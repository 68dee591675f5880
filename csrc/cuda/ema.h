// EMA update: three kernels, since the smoothing needs the total of all cluster sizes.
//
//   MoveAverages  a block per code: reads sums and average, writes average; a code that would not be finite keeps both
//   TotalSizes    a block per head: the sizes in float64, in a fixed order
//   MoveCodes     a block per code: reads average, writes the code
// Bytes: 16 K D and 4 K D more where the averages do not stay in L2. A code with all its columns in one block, so that
// what is not finite in one column keeps all of them.
#pragma once

#include "../ema_step.h"
#include "block.h"

namespace vqops::cuda {

struct EmaState {
    int64_t H, K, D;
    float *size, *average, *codes;  // [H, K], [H, K, D] twice; codes may be null
    const int64_t* counts;          // [H, K], or null and
    const float* weighted_counts;
    const float *sums, *weight, *decay;  // [H, K, D], [H, K] or null, [1]
    float* total;                        // [H]
    float eps;
    bool cosine;
};

struct MoveAverages {
    static constexpr int kThreads = 64;
    struct Shared {
        int spoiled;
    };
    EmaState state;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return state.H * state.K; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t k = block.index, D = state.D;
        const float step = state.weight ? (1 - *state.decay) * state.weight[k] : 1 - *state.decay;
        const float count = state.counts ? float(state.counts[k]) : state.weighted_counts[k];
        float* const average = state.average + k * D;
        const float* const sums = state.sums + k * D;
        block.for_threads_sync([&](int t) {
            if (t == 0) shared.spoiled = !is_finite(lerp(state.size[k], count, step));
        });
        block.for_threads_sync([&](int t) {
            for (int64_t i = t; i < D; i += kThreads)
                if (!is_finite(lerp(average[i], sums[i], step))) shared.spoiled = 1;
        });
        if (shared.spoiled) return;
        block.for_threads([&](int t) {
            if (t == 0) state.size[k] = lerp(state.size[k], count, step);
            for (int64_t i = t; i < D; i += kThreads) average[i] = lerp(average[i], sums[i], step);
        });
    }
};

struct TotalSizes {
    static constexpr int kThreads = 256;
    struct Shared {
        double part[kThreads];
    };
    EmaState state;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return state.H; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        block.for_threads_sync([&](int t) {
            double sum = 0;
            for (int64_t k = t; k < state.K; k += kThreads) sum += state.size[block.index * state.K + k];
            shared.part[t] = sum;
        });
        for (int half = kThreads / 2; half > 0; half /= 2)
            block.for_threads_sync([&](int t) {
                if (t < half) shared.part[t] += shared.part[t + half];
            });
        block.for_threads([&](int t) {
            if (t == 0) state.total[block.index] = float(shared.part[0]);
        });
    }
};

struct MoveCodes {
    static constexpr int kThreads = 64;
    struct Shared {
        double square[kThreads];
        int spoiled;
    };
    EmaState state;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return state.H * state.K; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t k = block.index, D = state.D;
        const float total = state.total[uint32_t(k) / uint32_t(state.K)];
        const float size = smoothed_size(state.size[k], total, float(state.K), state.eps);
        const float* const average = state.average + k * D;
        block.for_threads_sync([&](int t) {
            double square = 0;
            for (int64_t i = t; i < D && state.cosine; i += kThreads)
                square = add_product(square, average[i] / size, average[i] / size);
            shared.square[t] = square;
            if (t == 0) shared.spoiled = 0;
        });
        for (int half = kThreads / 2; half > 0 && state.cosine; half /= 2)
            block.for_threads_sync([&](int t) {
                if (t < half) shared.square[t] += shared.square[t + half];
            });
        const double norm = state.cosine ? divisor(shared.square[0]) : 1;
        block.for_threads_sync([&](int t) {
            for (int64_t i = t; i < D; i += kThreads)
                if (!is_finite(float(double(average[i] / size) / norm))) shared.spoiled = 1;
        });
        if (shared.spoiled) return;
        block.for_threads([&](int t) {
            for (int64_t i = t; i < D; i += kThreads)
                state.codes[k * D + i] = float(double(average[i] / size) / norm);
        });
    }
};

template <class Device>
void ema_update(const Device& device, const EmaState& state) {
    device.launch(MoveAverages{state});
    if (!state.codes) return;
    device.launch(TotalSizes{state});
    device.launch(MoveCodes{state});
}

}  // namespace vqops::cuda
