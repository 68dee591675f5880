// Exhaustive: rows against all codes in float64. Never run on a GPU.
//
// One block: 8 rows at a time, eight threads a code. k nearest codes take k passes, each for the next one in order.
#pragma once

#include "search_inputs.h"

namespace vqops::cuda {

template <class T>
struct Exhaustive {
    static constexpr int kThreads = 256, kRows = 8, kGroups = kThreads / kLanes;
    static constexpr int64_t kMostBlocks = 1024;  // a head; each takes its share of a list whose length it learns

    struct Shared {
        int64_t offset[kRows];  // of the row; -1: there is none
        uint32_t row[kRows];
        int32_t spoiled[kRows], index[kRows];
        double cost[kRows];
        double costs[kGroups][kRows];
        int32_t indices[kGroups][kRows];
    };
    struct Best {
        double cost;
        int32_t index;
    };

    SearchInputs<T> in;
    SearchOutputs out;
    bool all;  // every row, and not those of the list

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t across() const {
        const int64_t most = (in.N + kRows - 1) / kRows;
        return uint32_t(most < kMostBlocks ? most : kMostBlocks);
    }
    int64_t blocks() const { return in.H * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t h = uint32_t(block.index) / across(), rows = all ? in.N : int64_t(out.how_many[h]);
        for (int64_t top = uint32_t(block.index) % across() * kRows; top < rows; top += across() * kRows) {
            take_rows(block, shared, h, top, rows);
            for (int64_t place = 0; place < out.k; place++) {
                scan(block, shared, h, place);
                write(block, shared, h, place);
            }
        }
    }

private:
    template <class Block>
    VQOPS_HOST_DEVICE void take_rows(Block& block, Shared& shared, int64_t h, int64_t top, int64_t rows) const {
        block.each([&](int r) {
            if (r >= kRows) return;
            const bool exists = top + r < rows;
            shared.row[r] = exists ? (all ? uint32_t(top + r) : out.left[h * in.N + top + r]) : 0;
            shared.offset[r] = exists ? in.x.offset(h, shared.row[r]) : -1;
            shared.spoiled[r] = 0;
            shared.index[r] = -1, shared.cost[r] = 0;
        });
        block.each([&](int t) {
            const int r = t / 32;
            if (shared.offset[r] < 0) return;
            double zero = 0;
            for (int64_t i = t % 32; i < in.D; i += 32) zero += 0 * double(in.x.at(shared.offset[r], i));
            if (zero != 0) shared.spoiled[r] = 1;
        });
    }

    // The best code of each row behind the one before: shared.cost and shared.index.
    template <class Block>
    VQOPS_HOST_DEVICE void scan(Block& block, Shared& shared, int64_t h, int64_t place) const {
        auto best = block.template registers<Best>();
        auto sums = block.template registers<Doubles<kRows + 2>>();  // rows, 0 * c, c.c
        block.own([&](int t) { best[t] = {0, -1}; });
        for (int64_t base = 0; base < in.K; base += kGroups) {
            block.own([&](int t) {
                const int64_t k = base + t / kLanes;
                double* const v = sums[t].v;
                VQOPS_UNROLL(10)
                for (int r = 0; r < kRows + 2; r++) v[r] = 0;
                if (k >= in.K) return;
                const int64_t code = in.codebook.offset(h, k);
                for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                    const double c = in.codebook.at(code, i);
                    v[kRows] += 0 * c;
                    if (in.cosine) v[kRows + 1] = add_product(v[kRows + 1], c, c);
                    VQOPS_UNROLL(8)
                    for (int r = 0; r < kRows; r++) {
                        const double a = shared.offset[r] < 0 ? 0.0 : double(in.x.at(shared.offset[r], i));
                        v[r] = in.cosine ? add_product(v[r], a, c) : add_square(v[r], a, c);
                    }
                }
            });
            block.template sum<kLanes>(sums);
            block.own([&](int t) {  // lane r of the code's eight threads takes row r
                const int64_t k = base + t / kLanes;
                const double* const v = sums[t].v;
                if (k >= in.K || v[kRows] != 0) return;
                double cost = 0;
                const int row = t % kLanes;
                VQOPS_UNROLL(8)
                for (int r = 0; r < kRows; r++) cost += r == row ? v[r] : 0;  // v[row] would put v in memory
                if (in.cosine) cost = cosine_cost(cost, v[kRows + 1]);
                if (place > 0 && !before(shared.cost[row], shared.index[row], cost, k)) return;
                if (before(cost, k, best[t].cost, best[t].index)) best[t] = {cost, int32_t(k)};
            });
        }
        block.each([&](int t) {
            shared.costs[t / kLanes][t % kLanes] = best[t].cost;
            shared.indices[t / kLanes][t % kLanes] = best[t].index;
        });
        block.each([&](int r) {
            if (r >= kRows) return;
            Best least = {0, -1};
            for (int g = 0; g < kGroups; g++)
                if (before(shared.costs[g][r], shared.indices[g][r], least.cost, least.index))
                    least = {shared.costs[g][r], shared.indices[g][r]};
            shared.cost[r] = least.cost, shared.index[r] = least.index;
        });
    }

    // Place beyond the last code: index -1, and distance inf, or NaN for a row that is not finite.
    template <class Block>
    VQOPS_HOST_DEVICE void write(Block& block, Shared& shared, int64_t h, int64_t place) const {
        auto square = block.template registers<double>();
        block.own([&](int t) {
            const int r = t / kLanes;
            square[t] = 0;
            if (r >= kRows || shared.offset[r] < 0 || !in.cosine || !out.distances) return;
            for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                const double a = in.x.at(shared.offset[r], i);
                square[t] = add_product(square[t], a, a);
            }
        });
        block.template sum<kLanes>(square);
        block.own([&](int t) {
            const int r = t / kLanes;
            if (r >= kRows || t % kLanes != 0 || shared.offset[r] < 0) return;
            const bool kept = in.mask.keeps(h, shared.row[r]), usable = kept && !shared.spoiled[r];
            const bool found = usable && shared.index[r] >= 0;
            const int64_t to = (h * in.N + shared.row[r]) * out.k + place;
            out.indices[to] = found ? shared.index[r] : -1;
            if (out.tiers && place == 0) block.fetch_add(&out.tiers[found ? kScanned : kNoCode], Count(1));
            if (!out.distances) return;
            double distance = kept && shared.spoiled[r] ? NAN : HUGE_VAL;
            if (found) distance = in.cosine ? cosine_distance(shared.cost[r], square[t]) : shared.cost[r];
            write_value(out.distances, out.dtype, to, distance);
        });
        block.each([](int) {});
    }
};

}  // namespace vqops::cuda
