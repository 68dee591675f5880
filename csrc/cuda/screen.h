// Screen: the fast pass of the search, and the decisions that it leaves open. Never run on a GPU.
//
// One block: 64 to 256 rows of x against all K codes, in tiles of 64 (mma.sync) or 128 (wgmma, sm_90a).
//   registers     the products of a warp's 16, 32 or, with wgmma, 128 / 4 rows and a tile's codes
//   shared        the block's rows as float16; stages of codes, copied ahead; up to 16 candidates a row
// Each product gives a lower bound of the code's distance (bound.h); the least upper bound so far is the row's
// threshold. A tile whose least lower bound is above the thresholds of all of a warp's rows is done with: four
// operations a score. Else its codes below the threshold become candidates. Rows left with one are done; the others are
// decided in float64, eight threads a pair. Rows with too many go to Exhaustive by way of a list.
// A row belongs to one warp, so that nothing waits for another warp but the stages do.
// Bytes: 4 N D read (float32), 8 N written, the packed codes from L2 once a block. Operations: 2 N K D on tensor cores,
// 4 to 6 N K in the epilogue.
// The result does not depend on the order of the candidates, since float64 decides (distance.h). Proof: exactness.md.
// Sizes are guesses from the arithmetic, to be measured.
#pragma once

#include "scores.h"

namespace vqops::cuda {

template <class T, class Cores_, int kPiece>
struct Screen {
    typedef Cores_ Cores;
    typedef CodeTiles<Cores, kPiece> Codes;
    typedef RowTile<T, Cores, kPiece> Rows;
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows;
    static constexpr int kCapacity = 16;  // random and clustered data leave 1 to 3 candidates
    static constexpr int kPairs = kThreads / kLanes;
    typedef ScoresOf<Cores> Scores;
    static constexpr int kOwn = Scores::kOwn;

    struct Decision {
        double best[kRows], cost[kPairs];
        int32_t best_code[kRows], pairs;
        uint16_t pair[kRows * kCapacity];
    };
    struct Shared {
        union {
            typename Codes::Stage stages[Cores::kStages];
            Decision decision;  // afterwards
        };
        typename Rows::Shared rows;
        int32_t threshold[kRows];  // ordered(upper bound)
        int32_t count[kRows];      // more than kCapacity: not all are held
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
        block.each([](int) {});
        block.own([&](int t) {
            for (int r = t; r < kRows; r += kThreads) {
                const bool searched = shared.rows.state[r] == Rows::kSearched;
                shared.threshold[r] = ordered(searched ? kAbsentStart * 0x1p-10f : -INFINITY);
                shared.count[r] = 0;
            }
        });
        Codes{codes, in.K, rows().width()}.each(
            block, shared.stages, x, [&](int code, const Constants* constants, auto& products) {
                keep_candidates(block, shared, code, constants, codes.most + code / kTile, products);
            });
        decide(block, shared, h, first);
    }

private:
    template <class Block, class P>
    VQOPS_HOST_DEVICE void keep_candidates(Block& block, Shared& shared, int first, const Constants* constants,
                                           const Most* most, P& products) const {
        auto least = block.template registers<Floats<kOwn>>(), limit = block.template registers<Floats<kOwn>>();
        auto wanted = block.template registers<int32_t>();
        const auto smaller = [](float a, float b) { return fminf(a, b); };
        block.own([&](int t) {
            Scores::bound(t, shared.rows, constants, products[t], least[t]);
            bool any = false;
            VQOPS_UNROLL(4)
            for (int own = 0; own < kOwn; own++)
                any = any || least[t].v[own] <= from_ordered(shared.threshold[Scores::row_of(t, own)]);
            wanted[t] = any;
        });
        block.where(wanted, [&] {
            // The upper bound of the code with the least lower one is at most that with the tile's largest constants.
            Most largest = most[0];
            for (int i = 1; i < Cores::kCodes / kTile; i++)
                largest = {fmaxf(largest.radius, most[i].radius), fmaxf(largest.slack, most[i].slack)};
            const bool far = largest.slack >= -kAlwaysStart;
            block.template fold<4>(least, smaller);
            block.own([&](int t) {
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++) {
                    const RowBound& bound = shared.rows.bound[Scores::row_of(t, own)];
                    limit[t].v[own] = upper_bound(least[t].v[own], largest.slack, largest.radius, bound);
                }
                // A code that is always a candidate has the least lower bound, and says nothing about the others.
                if (far)
                    Scores::each(t, products[t], [&](int own, int i, int c, float& value) {
                        const RowBound& bound = shared.rows.bound[Scores::row_of(t, own)];
                        limit[t].v[own] = fminf(limit[t].v[own], constants[i].upper(c, value, bound));
                    });
            });
            block.template fold<4>(limit, smaller);
            block.each_warp([&](int t) {
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++)
                    limit[t].v[own] = fminf(limit[t].v[own], from_ordered(shared.threshold[Scores::row_of(t, own)]));
            });
            block.each_warp([&](int t) {
                Scores::each(t, products[t], [&](int own, int i, int c, float& value) {
                    if (value > limit[t].v[own] || constants[i].repeats(c)) return;
                    const int r = Scores::row_of(t, own);
                    block.lower(&shared.threshold[r], ordered(constants[i].upper(c, value, shared.rows.bound[r])));
                    const int place = block.fetch_add(&shared.count[r], 1);
                    if (place >= kCapacity) return;
                    shared.code[r][place] = first + i * kTile + c, shared.lower[r][place] = value;
                });
            });
            block.each_warp([&](int t) {
                for (int own = 0; own < kOwn && t % 4 == 0; own++) {
                    const int r = Scores::row_of(t, own);
                    if (shared.count[r] > kCapacity / 2) drop_excluded(shared, r);
                }
            });
        });
    }

    VQOPS_HOST_DEVICE void drop_excluded(Shared& shared, int r) const {
        if (shared.count[r] > kCapacity) {  // some were not held: the row takes no more
            shared.threshold[r] = ordered(-INFINITY);
            return;
        }
        const float threshold = from_ordered(shared.threshold[r]);
        int kept = 0;
        for (int i = 0; i < shared.count[r]; i++) {
            if (shared.lower[r][i] > threshold) continue;
            shared.code[r][kept] = shared.code[r][i];
            shared.lower[r][kept++] = shared.lower[r][i];
        }
        shared.count[r] = kept;
    }

    // Certified rows are written, rows with several candidates compared in float64, the rest put on the list.
    template <class Block>
    VQOPS_HOST_DEVICE void decide(Block& block, Shared& shared, int64_t h, int64_t first) const {
        Decision& decision = shared.decision;
        block.each([&](int t) {
            if (t == 0) decision.pairs = 0;
        });
        block.each([&](int t) {
            for (int r = t; r < kRows; r += kThreads) {
                if (shared.rows.state[r] != Rows::kSearched) continue;
                drop_excluded(shared, r);
                const int count = shared.count[r];
                decision.best_code[r] = count == 1 ? shared.code[r][0] : -1;
                if (count > kCapacity) shared.rows.state[r] = Rows::kLeft;
                if (count < 2 || count > kCapacity) continue;
                const int place = block.fetch_add(&decision.pairs, count);
                for (int i = 0; i < count; i++) decision.pair[place + i] = uint16_t(r * kCapacity + i);
            }
        });
        const int pairs = decision.pairs;
        auto sums = block.template registers<Doubles<2>>();
        for (int base = 0; base < pairs; base += kPairs) {
            block.own([&](int t) {
                sums[t].v[0] = sums[t].v[1] = 0;
                if (base + t / kLanes >= pairs) return;
                const int pair = decision.pair[base + t / kLanes], r = pair / kCapacity;
                const int64_t code = in.codebook.offset(h, shared.code[r][pair % kCapacity]);
                add_lane(in, in.x.offset(h, first + r), code, t % kLanes, sums[t].v);
            });
            block.template sum<kLanes>(sums);
            block.each([&](int t) {
                if (t % kLanes == 0)
                    decision.cost[t / kLanes] = in.cosine ? cosine_cost(sums[t].v[0], sums[t].v[1]) : sums[t].v[0];
            });
            block.each([&](int t) {
                for (int p = 0; p < kPairs && base + p < pairs && t == 0; p++) {
                    const int pair = decision.pair[base + p], r = pair / kCapacity;
                    const int32_t code = shared.code[r][pair % kCapacity];
                    if (!before(decision.cost[p], code, decision.best[r], decision.best_code[r])) continue;
                    decision.best[r] = decision.cost[p], decision.best_code[r] = code;
                }
            });
        }
        block.own([&](int t) {
            for (int r = t; r < kRows && first + r < in.N; r += kThreads) {
                const auto state = shared.rows.state[r];
                if (state == Rows::kLeft) {
                    out.left[h * in.N + block.fetch_add(&out.how_many[h], 1)] = uint32_t(first + r);
                    continue;
                }
                out.indices[h * in.N + first + r] = state == Rows::kOutside ? -1 : decision.best_code[r];
                if (!out.tiers) continue;
                const bool none = state == Rows::kOutside || shared.count[r] == 0;
                block.fetch_add(&out.tiers[none ? kNoCode : shared.count[r] == 1 ? kCertified : kDecided], Count(1));
            }
        });
    }
};

}  // namespace vqops::cuda
