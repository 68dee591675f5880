// ScreenTopk: the fast pass of the search for k nearest codes, and the decisions that it leaves.
//
// Screen with longer lists. One block: 64 rows, or 32 where D wants it, against all K codes in tiles of 64, by
// mma.sync. A row holds up to kCapacity candidates in shared memory; its threshold is the k-th least upper bound of
// those it holds, found by bisection of the bits when the list might not take another tile. What is left at the end,
// some codes more than k, is compared in float64, a warp per row, and written in order. Rows with too many are
// queued for Scan.
// Bytes: 4 N D read (float32), 12 k N written, the packed codes from L2 once per block. Operations: 2 N K D on tensor
// cores, 4 to 6 N K in the epilogue.
#pragma once

#include "scores.h"

namespace vqops::cuda {

template <class T, int kPiece, int kWarps>
struct ScreenTopk {
    typedef WarpCores<kWarps, 1, 2> Cores;
    typedef CodeTiles<Cores, kPiece> Codes;
    typedef RowTile<T, Cores, kPiece> Rows;
    typedef ScoresOf<Cores> Scores;
    static constexpr bool kAllRegisters = true;
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows, kOwn = Scores::kOwn;
    static constexpr int kRowsOfWarp = 16, kCapacity = 128;  // two tiles: 32 nearest so far, and one more tile
    static constexpr int kHeld = kCapacity / 32;            // of a list, by a thread

    struct Costs {
        double cost[kCapacity];
    };
    struct Shared {
        union {
            typename Codes::Stage stages[Cores::kStages];
            Costs costs[kWarps];  // afterwards
        };
        typename Rows::Shared rows;
        float threshold[kRows];
        int32_t count[kRows];  // more than kCapacity: not all are held
        int32_t code[kRows][kCapacity];
        float lower[kRows][kCapacity];
    };

    SearchInputs<T> in;
    SearchOutputs out;
    Preparation packed;

    VQOPS_HOST_DEVICE Rows rows() const { return {in}; }
    size_t shared_bytes() const { return sizeof(Shared) + size_t(rows().bytes()); }
    VQOPS_HOST_DEVICE uint32_t across() const { return uint32_t((in.N + kRows - 1) / kRows); }
    int64_t blocks() const { return in.H * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t h = uint32_t(block.index) / across(), first = int64_t(uint32_t(block.index) % across()) * kRows;
        const Packed codes = packed.head(h);
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);  // [kRows, width] as row_tile.h places them
        rows().take(block, shared.rows, codes, x, h, first);
        block.for_threads_sync([](int) {});
        block.for_threads([&](int t) {
            for (int r = t; r < kRows; r += kThreads) {
                const bool searched = shared.rows.state[r] == kSearched;
                shared.threshold[r] = searched ? kNoThreshold : -INFINITY;
                shared.count[r] = 0;
            }
        });
        Codes{codes, in.K, rows().width(), 0, 1}.each(
            block, shared.stages, x, [&](auto&, int code, const Constants* constants, auto& products) {
                keep_candidates(block, shared, codes, code, constants, products);
            });
        for (int r = 0; r < kRowsOfWarp; r++) {
            drop_excluded(block, shared, codes, r, 0);
            decide(block, shared, codes, h, first, r);
        }
    }

private:
    static VQOPS_HOST_DEVICE int row_of(int t, int r) { return t / 32 * kRowsOfWarp + r; }

    template <class Block, class P>
    VQOPS_HOST_DEVICE void keep_candidates(Block& block, Shared& shared, const Packed& codes, int first,
                                           const Constants* constants, P& products) const {
        auto least = block.template registers<Floats<kOwn>>();
        auto wanted = block.template registers<int32_t>();
        block.for_threads([&](int t) {
            Scores::bound(t, shared.rows, constants, products[t], least[t]);
            wanted[t] = 0;
            VQOPS_UNROLL(2)
            for (int own = 0; own < kOwn; own++)
                wanted[t] |= least[t].v[own] <= shared.threshold[Scores::row_of(t, own)] ? 1 : 0;
        });
        block.if_any_in_warp(wanted, [&] {
            block.for_threads_syncwarp([&](int t) {
                Scores::each(t, products[t], [&](int own, int, int c, float& value) {
                    const int r = Scores::row_of(t, own);
                    if (value > shared.threshold[r]) return;
                    const int place = block.atomic_add(&shared.count[r], 1);
                    if (place >= kCapacity) return;
                    shared.code[r][place] = first + c, shared.lower[r][place] = value;
                });
            });
            for (int r = 0; r < kRowsOfWarp; r++) drop_excluded(block, shared, codes, r, kCapacity - kTile);
        });
    }

    // Of each warp's row r, if it holds more than `most`: its threshold, and the candidates that do not exceed it.
    template <class Block>
    VQOPS_HOST_DEVICE void drop_excluded(Block& block, Shared& shared, const Packed& codes, int r, int most) const {
        struct Held {
            int32_t code[kHeld];
            float lower[kHeld];
            int32_t upper[kHeld];  // ordered; beyond all others where nothing is held
        };
        auto held = block.template registers<Held>();
        auto wanted = block.template registers<int32_t>(), below = block.template registers<int32_t>();
        auto limit = block.template registers<uint32_t>();
        const float slack = slack_of_start(in.D);
        block.for_threads([&](int t) { wanted[t] = shared.count[row_of(t, r)] > most; });
        block.if_any_in_warp(wanted, [&] {
            block.for_threads_syncwarp([&](int t) {
                const int row = row_of(t, r), count = shared.count[row];
                VQOPS_UNROLL(4)
                for (int i = 0; i < kHeld; i++) {
                    const int place = i * 32 + t % 32;
                    held[t].upper[i] = INT32_MAX;
                    if (place >= count || count > kCapacity) continue;
                    const int32_t code = held[t].code[i] = shared.code[row][place];
                    const float lower = held[t].lower[i] = shared.lower[row][place];
                    const Constants& tile = codes.constants[code / kTile];
                    held[t].upper[i] = ordered(upper_bound(lower, tile.start_topk[code % kTile], slack,
                                                           tile.radius[code % kTile], shared.rows.bound[row]));
                }
                limit[t] = 0;
            });
            // The largest number of which fewer than k upper bounds are less, bit by bit: the k-th least of them.
            for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
                block.for_threads([&](int t) {
                    below[t] = 0;
                    VQOPS_UNROLL(4)
                    for (int i = 0; i < kHeld; i++) below[t] += unsigned_order(held[t].upper[i]) < (limit[t] | bit);
                });
                block.template shuffle_sum<32>(below);
                block.for_threads([&](int t) {
                    if (below[t] < out.k) limit[t] |= bit;
                });
            }
            block.for_threads_syncwarp([&](int t) {
                const int row = row_of(t, r);
                if (t % 32 != 0) return;
                // Some were not held: the row takes no more. Fewer than k are held: it still takes all.
                if (shared.count[row] > kCapacity) shared.threshold[row] = -INFINITY;
                else if (shared.count[row] >= out.k)
                    shared.threshold[row] = from_ordered(int32_t(limit[t] ^ 1u << 31));
            });
            block.for_threads_syncwarp([&](int t) {
                if (t % 32 == 0 && shared.count[row_of(t, r)] <= kCapacity) shared.count[row_of(t, r)] = 0;
            });
            block.for_threads_syncwarp([&](int t) {
                const int row = row_of(t, r);
                VQOPS_UNROLL(4)
                for (int i = 0; i < kHeld; i++) {
                    if (held[t].upper[i] == INT32_MAX || held[t].lower[i] > shared.threshold[row]) continue;
                    const int place = block.atomic_add(&shared.count[row], 1);
                    shared.code[row][place] = held[t].code[i], shared.lower[row][place] = held[t].lower[i];
                }
            });
        });
    }

    static VQOPS_HOST_DEVICE uint32_t unsigned_order(int32_t ordered) { return uint32_t(ordered) ^ 1u << 31; }

    // Each warp's row r: its candidates compared in float64, eight threads per code; the k first are written in order.
    template <class Block>
    VQOPS_HOST_DEVICE void decide(Block& block, Shared& shared, const Packed& codes, int64_t h, int64_t first,
                                  int r) const {
        auto sums = block.template registers<Doubles<2>>();
        auto square = block.template registers<double>();
        auto wanted = block.template registers<int32_t>();
        const auto count_of = [&](int t) {
            const int count = shared.count[row_of(t, r)];
            return shared.rows.state[row_of(t, r)] != kSearched || count > kCapacity ? 0 : count;
        };
        const auto offset = [&](int t) { return in.x.offset(h, first + row_of(t, r)); };
        for (int base = 0; base < kCapacity; base += 32 / kLanes) {
            block.for_threads([&](int t) { wanted[t] = base < count_of(t); });
            block.if_any_in_warp(wanted, [&] {
                const auto place = [&](int t) { return base + t % 32 / kLanes; };
                block.for_threads([&](int t) {
                    sums[t].v[0] = sums[t].v[1] = 0;
                    if (place(t) >= count_of(t)) return;
                    const int64_t code = in.codebook.offset(h, shared.code[row_of(t, r)][place(t)]);
                    add_lane(in, offset(t), code, t % kLanes, sums[t].v);
                });
                block.template shuffle_sum<kLanes>(sums);
                block.for_threads_syncwarp([&](int t) {
                    if (t % kLanes == 0 && place(t) < count_of(t))
                        shared.costs[t / 32].cost[place(t)] =
                            in.cosine ? cosine_cost(sums[t].v[0], sums[t].v[1]) : sums[t].v[0];
                });
            });
        }
        block.for_threads([&](int t) {
            square[t] = 0;
            for (int64_t i = t % kLanes; i < in.D && in.cosine && count_of(t) > 0; i += kLanes) {
                const double a = in.x.at(offset(t), i);
                square[t] = add_product(square[t], a, a);
            }
        });
        block.template shuffle_sum<kLanes>(square);
        block.for_threads_syncwarp([&](int t) {
            const int row = row_of(t, r), count = count_of(t);
            if (first + row >= in.N) return;
            const State state = shared.rows.state[row];
            const bool far = state == kSearched && *codes.far != kNoneFar && shared.threshold[row] >= kFarBound;
            if (state == kQueued || state == kZero || far || shared.count[row] > kCapacity) {
                if (t % 32 == 0)
                    out.queue[h * in.N + block.atomic_add(&out.queued[h], 1)] = uint32_t(first + row);
                return;
            }
            if (out.tiers && t % 32 == 0) block.atomic_add(&out.tiers[count > 0 ? kDecided : kNoCode], Count(1));
            const int64_t to = (h * in.N + first + row) * out.k;
            const auto write = [&](int64_t place, int32_t code, double distance) {
                out.indices[to + place] = code;
                write_value(out.distances, out.dtype, to + place, distance);
            };
            const double* const cost = shared.costs[t / 32].cost;
            for (int i = t % 32; i < count; i += 32) {
                const int32_t code = shared.code[row][i];
                int rank = 0;
                for (int j = 0; j < count; j++) rank += before(cost[j], shared.code[row][j], cost[i], code) ? 1 : 0;
                if (rank < out.k) write(rank, code, in.cosine ? cosine_distance(cost[i], square[t]) : cost[i]);
            }
            for (int64_t place = count + t % 32; place < out.k; place += 32) write(place, -1, HUGE_VAL);
        });
    }
};

}  // namespace vqops::cuda
