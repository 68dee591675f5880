// Preparation of a codebook: Survey, which is here, and the kernels of codebook.h.
#pragma once

#include "codebook.h"

namespace vqops::cuda {

// Counters that start at 0.
struct Counters {
    int32_t* data;
    int64_t count;
};

// What the other kernels start from, by three kinds of blocks side by side:
//   centre  16 dimensions: in each the median of a sample of 32 codes, which no single code can move
//   header  a head: the first values of what is raised, lowered or counted; and the scale, a power of two that brings
//           the typical distance from the centre to [1, 2). That is the median of 32 distances between sampled codes,
//           by sqrt(2) since two codes are that much farther apart; no single code has more than two of the 32
//   marks   4096 of a head: no code has been there
// Bytes: 16 dimensions of each sampled code, for cosine all of them, for its length; the marks written.
struct Survey {
    static constexpr int kThreads = 256, kColumns = 16, kMarks = 4096;
    struct Shared {
        double divisor[kSample], distance[kSample];
        float value[kSample][kColumns];
    };
    Preparation in;
    Counters counters;

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t slices() const { return uint32_t((in.D + kColumns - 1) / kColumns); }
    VQOPS_HOST_DEVICE uint32_t across() const { return slices() + 1 + uint32_t((2 * in.slots + kMarks - 1) / kMarks); }
    int64_t blocks() const { return in.H * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const uint32_t h = uint32_t(block.index) / across(), i = uint32_t(block.index) % across();
        if (i < slices()) find_centre(block, shared, h, i * kColumns);
        else if (i == slices()) begin_header(block, shared, h);
        else clear_marks(block, h, int64_t(i - slices() - 1) * kMarks);
    }

private:
    // Of `count` values, NaN for those left out, whether value s is the median: one is, the first if all are left out.
    template <class At>
    static VQOPS_HOST_DEVICE bool is_median(int count, int s, const At& at) {
        const auto value = at(s);
        int there = 0, rank = 0;
        VQOPS_UNROLL(8)
        for (int i = 0; i < count; i++) {
            const auto other = at(i);
            there += other == other ? 1 : 0;
            rank += other < value || (other == value && i < s) ? 1 : 0;
        }
        return there == 0 ? s == 0 : value == value && rank == there / 2;
    }

    template <class Block>
    VQOPS_HOST_DEVICE void find_centre(Block& block, Shared& shared, int64_t h, int64_t left) const {
        const int count = in.sample();
        if (in.cosine) {
            auto sums = block.template registers<Doubles<2>>();
            block.for_threads([&](int t) {  // 8 threads per code
                double square = 0, zero = 0;
                const int64_t code = in.codebook.offset(h, in.sampled(t / 8 % count));
                each_value(t % 8, [&](const auto& value, int64_t i) {
                    const double c = value(code, i);
                    square += c * c, zero += 0 * c;
                });
                sums[t].v[0] = square, sums[t].v[1] = zero;
            });
            block.template shuffle_sum<8>(sums);
            block.for_threads_sync([&](int t) {
                if (t % 8 == 0) shared.divisor[t / 8] = in.divisor_of(sums[t].v[0], sums[t].v[1]);
            });
        }
        block.for_threads_sync([&](int t) {
            const int64_t i = left + t % kColumns;
            for (int s = t / kColumns; s < count && i < in.D; s += kThreads / kColumns) {
                const double value = in.codebook.at(in.codebook.offset(h, in.sampled(s)), i);
                const float scaled = float(in.cosine ? value / shared.divisor[s] : value);
                shared.value[s][t % kColumns] = std::isfinite(scaled) ? scaled : NAN;
            }
        });
        block.for_threads([&](int t) {
            const int column = t % kColumns;
            for (int s = t / kColumns; s < count && left + column < in.D; s += kThreads / kColumns) {
                if (!is_median(count, s, [&](int i) { return shared.value[i][column]; })) continue;
                const float value = shared.value[s][column];
                in.head(h).centre[left + column] = value == value ? value : 0;
            }
        });
    }

    template <class Block>
    VQOPS_HOST_DEVICE void begin_header(Block& block, Shared& shared, int64_t h) const {
        const Packed packed = in.head(h);
        const int count = in.sample();
        auto sums = block.template registers<double>();
        block.for_threads([&](int t) {  // 8 threads per pair of codes
            double sum = 0;
            // An odd number of places on: also a codebook that is twice the same has distances.
            const int64_t code = in.codebook.offset(h, in.sampled(t / 8 % count));
            const int64_t other = in.codebook.offset(h, in.sampled((t / 8 + (count / 2 | 1)) % count));
            if (t / 8 < count && !in.cosine)
                each_value(t % 8, [&](const auto& value, int64_t i) {
                    const double e = value(code, i) - value(other, i);
                    sum += e * e;
                });
            sums[t] = sum;
        });
        block.template shuffle_sum<8>(sums);
        block.for_threads_sync([&](int t) {
            const double distance = std::sqrt(sums[t] / 2);
            if (t % 8 == 0) shared.distance[t / 8] = distance > 0 && std::isfinite(distance) ? distance : NAN;
        });
        block.for_threads([&](int t) {
            if (t == 0) {
                *packed.worst = 0, *packed.closest = HUGE_VALF;
                *packed.first = kUnmarked, *packed.far = kNoneFar;
            }
            if (t >= count || !is_median(count, t, [&](int i) { return shared.distance[i]; })) return;
            const double typical = shared.distance[t];
            const int exponent = typical > 0 ? -exponent_of(typical) : 0;
            *packed.scale = float(power_of_two(exponent < -126 ? -126 : exponent > 126 ? 126 : exponent));
        });
        block.for_threads([&](int t) {
            for (int64_t tile = t; tile < round_up(in.K, kWholeTiles) / kTile; tile += kThreads)
                packed.constants[tile].unit = packed.constants[tile].largest = 0;
            for (int64_t i = h * kThreads + t; i < counters.count; i += in.H * kThreads) counters.data[i] = 0;
        });
    }

    template <class Block>
    VQOPS_HOST_DEVICE void clear_marks(Block& block, int64_t h, int64_t first) const {
        const int64_t end = first + kMarks < 2 * in.slots ? first + kMarks : 2 * in.slots;
        block.for_threads([&](int t) {
            for (int64_t i = first + t; i < end; i += kThreads) in.marks[2 * h * in.slots + i] = kUnmarked;
        });
    }

    // body(value, i) for one dimension in eight; value(code, i) reads.
    template <class Body>
    VQOPS_HOST_DEVICE void each_value(int lane, const Body& body) const {
        in.codebook.with_type([&](const auto* values) {
            const auto value = [&](int64_t code, int64_t i) {
                return double(real(values[code + i * in.codebook.stride]));
            };
            VQOPS_UNROLL(4)
            for (int64_t i = lane; i < in.D; i += 8) body(value, i);
        });
    }
};

// Sets `counters` to 0, too: of the search that follows, if there is one.
template <class Device>
void pack_codebook(const Device& device, const Preparation& in, const Counters& counters = {}) {
    device.launch(Survey{in, counters});
    device.launch(MarkCodes{in});
    device.launch(Pack{in});
}

}  // namespace vqops::cuda
