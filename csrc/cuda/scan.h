// Scan: rows against all codes in float64.
//
// One block: 8 rows at a time, eight threads per code. k nearest codes take k passes, each for the next one in order. A
// few rows, as is usual in the queue, would leave most of the GPU idle: then blocks share their codes, and the last one
// to be done with its share merges them all.
#pragma once

#include "search_inputs.h"

namespace vqops::cuda {

template <class T>
struct Scan {
    static constexpr int kThreads = 256, kRows = kRowsOfScan, kGroups = kThreads / kLanes, kBlocksAtOnce = 2;

    static_assert(kRows == kLanes);  // each of a code's threads has the sum of one row

    struct Shared {
        int64_t offset[kRows];  // of the row; -1: there is none
        uint32_t row[kRows];
        int32_t kept[kRows], spoiled[kRows], index[kRows];
        double cost[kRows];
        double costs[kGroups][kRows];
        int32_t indices[kGroups][kRows];
    };

    SearchInputs<T> in;
    SearchOutputs out;
    bool all;             // every row, and not those of the queue
    int64_t most_blocks;  // a head; each takes its share of a list whose length it learns

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE int64_t most_shares() const {
        return out.distances ? 1 : (in.K + kLeastShare - 1) / kLeastShare;
    }
    VQOPS_HOST_DEVICE uint32_t across() const {
        const int64_t most = (in.N + kRows - 1) / kRows * most_shares();
        return uint32_t(most < most_blocks ? most : most_blocks);
    }
    int64_t blocks() const { return in.H * across(); }

    // Blocks that share the codes of each of `rows` rows.
    VQOPS_HOST_DEVICE int64_t shares_of(int64_t rows) const {
        const int64_t fitting = rows > 0 ? parts_of(in.N, in.K) / rows : 1, most = most_shares();
        return fitting < 2 ? 1 : fitting < most ? fitting : most;
    }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t h = uint32_t(block.index) / across(), rows = all ? in.N : int64_t(out.queued[h]);
        const int64_t shares = shares_of(rows), share = round_up((in.K + shares - 1) / shares, kGroups);
        const int64_t items = (rows + kRows - 1) / kRows * shares;
        for (int64_t item = uint32_t(block.index) % across(); item < items; item += across()) {
            const int64_t top = item / shares * kRows, begin = item % shares * share;
            const int64_t end = begin + share < in.K ? begin + share : in.K;
            take_rows(block, shared, h, top, rows);
            bool any = false;
            for (int r = 0; r < kRows; r++) any = any || shared.kept[r];
            for (int64_t place = 0; place < out.k; place++) {
                if (any) find_next(block, shared, h, place, begin, end);
                if (shares == 1 || merge(block, shared, h, item, shares)) write(block, shared, h, place);
            }
        }
    }

private:
    template <class Block>
    VQOPS_HOST_DEVICE void take_rows(Block& block, Shared& shared, int64_t h, int64_t top, int64_t rows) const {
        block.for_threads_sync([&](int r) {
            if (r >= kRows) return;
            const bool exists = top + r < rows;
            shared.row[r] = exists ? (all ? uint32_t(top + r) : out.queue[h * in.N + top + r]) : 0;
            shared.offset[r] = exists ? in.x.offset(h, shared.row[r]) : -1;
            shared.kept[r] = exists && in.mask.keeps(h, shared.row[r]);
            shared.spoiled[r] = 0;
            shared.index[r] = -1, shared.cost[r] = 0;
        });
        block.for_threads_sync([&](int t) {
            const int r = t / 32;
            if (shared.offset[r] < 0) return;
            double zero = 0;
            for (int64_t i = t % 32; i < in.D; i += 32) zero += 0 * double(in.x.at(shared.offset[r], i));
            if (zero != 0) shared.spoiled[r] = 1;
        });
    }

    // The best code of each row behind the one before, of those from begin to end: shared.cost and shared.index.
    template <class Block>
    VQOPS_HOST_DEVICE void find_next(Block& block, Shared& shared, int64_t h, int64_t place, int64_t begin,
                                     int64_t end) const {
        auto best = block.template registers<Best>();
        auto of_code = block.template registers<Doubles<2>>();  // 0 * c, c.c
        auto of_rows = block.template registers<Doubles<kRows>>();
        auto sum = block.template registers<double>();  // lane r of the code's eight threads has row r's
        auto x = block.template registers<Many<const T*, kRows>>();  // another row where there is none
        block.for_threads([&](int t) {
            best[t] = {0, -1};
            VQOPS_UNROLL(8)
            for (int r = 0; r < kRows; r++) x[t].v[r] = in.x.data + (shared.offset[r] < 0 ? 0 : shared.offset[r]);
        });
        for (int64_t base = begin; base < end; base += kGroups) {
            block.for_threads([&](int t) {
                const int64_t k = base + t / kLanes;
                double zero = 0, square = 0;
                Doubles<kRows> rows = {};
                if (k < end)
                    in.codebook.with_type([&](const auto* codes) {
                        const auto* const code = codes + in.codebook.offset(h, k);
                        VQOPS_UNROLL(1)  // more would not fit in the registers of two blocks
                        for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                            const double c = real(code[i * in.codebook.stride]);
                            zero += 0 * c;
                            if (in.cosine) square = add_product(square, c, c);
                            VQOPS_UNROLL(8)
                            for (int r = 0; r < kRows; r++) {
                                const double a = real(x[t].v[r][i * in.x.stride]);
                                rows.v[r] = in.cosine ? add_product(rows.v[r], a, c) : add_square(rows.v[r], a, c);
                            }
                        }
                    });
                of_code[t].v[0] = zero, of_code[t].v[1] = square, of_rows[t] = rows;
            });
            block.template shuffle_sum<kLanes>(of_code);
            block.shuffle_sum_each(of_rows, sum);
            block.for_threads([&](int t) {
                const int64_t k = base + t / kLanes;
                if (k >= end || of_code[t].v[0] != 0) return;
                const double cost = in.cosine ? cosine_cost(sum[t], of_code[t].v[1]) : sum[t];
                const int row = t % kLanes;
                if (place > 0 && !before(shared.cost[row], shared.index[row], cost, k)) return;
                if (before(cost, k, best[t].cost, best[t].index)) best[t] = {cost, int32_t(k)};
            });
        }
        take_least(block, shared, best);
    }

    // Whether this block is the last to be done with its share of a row's codes: it takes the best of all shares.
    template <class Block>
    VQOPS_HOST_DEVICE bool merge(Block& block, Shared& shared, int64_t h, int64_t item, int64_t shares) const {
        Best* const parts = out.parts + h * parts_of(in.N, in.K) + item / shares * kRows * shares;
        block.for_threads([&](int r) {
            if (r < kRows && shared.offset[r] >= 0)
                parts[r * shares + item % shares] = {shared.cost[r], shared.index[r]};
        });
        if (!block.last_to_arrive(&out.arrived[h * shared_groups(in.N) + item / shares], int32_t(shares))) return false;
        auto best = block.template registers<Best>();
        block.for_threads([&](int t) {
            const int r = t % kRows;
            best[t] = {0, -1};
            for (int64_t i = t / kRows; i < shares && shared.offset[r] >= 0; i += kGroups) {
                const Best part = parts[r * shares + i];
                if (before(part.cost, part.index, best[t].cost, best[t].index)) best[t] = part;
            }
        });
        take_least(block, shared, best);
        return true;
    }

    // shared.cost and shared.index of row r: the least of `best` of threads r, r + 8, ...
    template <class Block, class All>
    VQOPS_HOST_DEVICE void take_least(Block& block, Shared& shared, All& best) const {
        block.for_threads_sync([&](int t) {
            shared.costs[t / kRows][t % kRows] = best[t].cost;
            shared.indices[t / kRows][t % kRows] = best[t].index;
        });
        block.for_threads_sync([&](int r) {
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
        block.for_threads([&](int t) {
            const int r = t / kLanes;
            square[t] = 0;
            if (r >= kRows || shared.offset[r] < 0 || !in.cosine || !out.distances) return;
            for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                const double a = in.x.at(shared.offset[r], i);
                square[t] = add_product(square[t], a, a);
            }
        });
        block.template shuffle_sum<kLanes>(square);
        block.for_threads([&](int t) {
            const int r = t / kLanes;
            if (r >= kRows || t % kLanes != 0 || shared.offset[r] < 0) return;
            const bool kept = shared.kept[r], found = kept && !shared.spoiled[r] && shared.index[r] >= 0;
            const int64_t to = (h * in.N + shared.row[r]) * out.k + place;
            out.indices[to] = found ? shared.index[r] : -1;
            if (out.tiers && place == 0) block.atomic_add(&out.tiers[found ? kScanned : kNoCode], Count(1));
            if (!out.distances) return;
            double distance = kept && shared.spoiled[r] ? NAN : HUGE_VAL;
            if (found) distance = in.cosine ? cosine_distance(shared.cost[r], square[t]) : shared.cost[r];
            write_value(out.distances, out.dtype, to, distance);
        });
        block.for_threads_sync([](int) {});
    }
};

}  // namespace vqops::cuda
