// Screen: the fast pass of the search, and the decisions that it leaves open.
//
// One block: 32 to 256 rows of x against all K codes, in tiles of 64 (mma.sync) or 128 (wgmma, sm_90a).
//   registers     the products of a warp's 16 or 32 rows and a tile's codes
//   shared        the block's rows as float16; stages of codes, copied ahead; up to 16 candidates per row
// Each product gives a lower bound of the code's distance (bound.h); the least upper bound so far is the row's
// threshold. A tile whose least lower bound is above the thresholds of all of a warp's rows is done with: four
// operations per score. Else its codes below the threshold become candidates, which decide.h decides between.
// A row belongs to one warp, so that only the stages wait for all warps. Where there are fewer rows than a GPU can work
// at, blocks share their codes, and MergeLists decides.
// Bytes: 4 N D read (float32), 8 N written, the packed codes from L2 once per block. Operations: 2 N K D on tensor
// cores, 4 to 6 N K in the epilogue.
// The result does not depend on the order of the candidates, since float64 decides (distance.h). Proof: exactness.md.
// Sizes are guesses from the arithmetic, to be measured.
#pragma once

#include "decide.h"
#include "scores.h"

namespace vqops::cuda {

template <class T, class Cores_, int kPiece>
struct Screen {
    typedef Cores_ Cores;
    typedef CodeTiles<Cores, kPiece> Codes;
    typedef RowTile<T, Cores, kPiece> Rows;
    static constexpr bool kAllRegisters = true;
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows;
    typedef Decide<T, kThreads, kRows> Decisions;
    typedef ScoresOf<Cores> Scores;
    static constexpr int kOwn = Scores::kOwn;

    struct Shared {
        union {
            typename Codes::Stage stages[Cores::kStages];
            typename Decisions::Shared decisions;  // afterwards
        };
        typename Rows::Shared rows;
        Candidates list[kRows];
    };

    SearchInputs<T> in;
    SearchOutputs out;
    Preparation packed;
    int64_t shares;  // blocks that share the codes of the same rows

    VQOPS_HOST_DEVICE Rows rows() const { return {in}; }
    size_t shared_bytes() const { return sizeof(Shared) + size_t(rows().bytes()); }
    VQOPS_HOST_DEVICE uint32_t across() const { return uint32_t((in.N + kRows - 1) / kRows); }
    int64_t blocks() const { return in.H * shares * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t part = uint32_t(block.index) / across();
        const int64_t first = int64_t(uint32_t(block.index) % across()) * kRows;
        const int64_t h = uint32_t(part) / uint32_t(shares), share = part - h * shares;
        const Packed codes = packed.head(h);
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);  // [kRows, width] as row_tile.h places them
        rows().take(block, shared.rows, codes, x, h, first);
        block.for_threads_sync([](int) {});
        block.for_threads([&](int t) {
            for (int r = t; r < kRows; r += kThreads) shared.list[r].clear(shared.rows.state[r]);
        });
        Codes{codes, in.K, rows().width(), share, shares}.each(
            block, shared.stages, x, [&](int code, const Constants* constants, auto& products) {
                keep_candidates(block, shared, code, constants, codes.most + code / kTile, products);
            });
        if (shares == 1) Decisions{in, out}.run(block, shared.decisions, codes, shared.list, h, first);
        else
            block.for_threads([&](int t) {
                for (int r = t; r < kRows && first + r < in.N; r += kThreads)
                    out.lists[part * in.N + first + r] = shared.list[r];
            });
    }

private:
    static VQOPS_HOST_DEVICE float threshold_of(const Shared& shared, int t, int own) {
        return from_ordered(shared.list[Scores::row_of(t, own)].threshold);
    }

    template <class Block, class P>
    VQOPS_HOST_DEVICE void keep_candidates(Block& block, Shared& shared, int first, const Constants* constants,
                                           const Most* most, P& products) const {
        auto least = block.template registers<Floats<kOwn>>(), limit = block.template registers<Floats<kOwn>>();
        auto wanted = block.template registers<int32_t>();
        const auto smaller = [](float a, float b) { return fminf(a, b); };
        block.for_threads([&](int t) {
            Scores::bound(t, shared.rows, constants, products[t], least[t]);
            bool any = false;
            VQOPS_UNROLL(4)
            for (int own = 0; own < kOwn; own++)
                any = any || least[t].v[own] <= threshold_of(shared, t, own);
            wanted[t] = any;
        });
        block.if_any_in_warp(wanted, [&] {
            // The upper bound of the code with the least lower one is at most that with the tile's largest constants.
            Most largest = most[0];
            for (int i = 1; i < Cores::kCodes / kTile; i++)
                largest = {fmaxf(largest.radius, most[i].radius), fmaxf(largest.slack, most[i].slack)};
            const bool far = largest.slack >= -kAlwaysStart;
            block.template shuffle_reduce<4>(least, smaller);
            block.for_threads([&](int t) {
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++) {
                    const RowBound& bound = shared.rows.bound[Scores::row_of(t, own)];
                    limit[t].v[own] = upper_bound(least[t].v[own], largest.slack, largest.radius, bound);
                }
                // A code that is always a candidate has the least lower bound, and says nothing about the others. And
                // where there is no threshold yet, one code far out must not let all others in.
                bool fresh = false;
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++)
                    fresh = fresh || threshold_of(shared, t, own) == kNoThreshold;
                if (far || fresh)
                    Scores::each(t, products[t], [&](int own, int i, int c, float& value) {
                        const RowBound& bound = shared.rows.bound[Scores::row_of(t, own)];
                        limit[t].v[own] = fminf(limit[t].v[own], constants[i].upper(c, value, bound));
                    });
            });
            block.template shuffle_reduce<4>(limit, smaller);
            block.for_threads_syncwarp([&](int t) {
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++)
                    limit[t].v[own] = fminf(limit[t].v[own], threshold_of(shared, t, own));
            });
            block.for_threads_syncwarp([&](int t) {
                Scores::each(t, products[t], [&](int own, int i, int c, float& value) {
                    if (value > limit[t].v[own] || constants[i].repeats(c)) return;
                    Candidates& list = shared.list[Scores::row_of(t, own)];
                    const RowBound& bound = shared.rows.bound[Scores::row_of(t, own)];
                    block.atomic_min(&list.threshold, ordered(constants[i].upper(c, value, bound)));
                    const int place = block.atomic_add(&list.count, 1);
                    if (place >= kCapacity) return;
                    list.code[place] = first + i * kTile + c, list.lower[place] = value;
                });
            });
            block.for_threads_syncwarp([&](int t) {
                for (int own = 0; own < kOwn && t % 4 == 0; own++) {
                    Candidates& list = shared.list[Scores::row_of(t, own)];
                    if (list.count > kCapacity / 2) list.drop_excluded();
                }
            });
        });
    }
};

}  // namespace vqops::cuda
