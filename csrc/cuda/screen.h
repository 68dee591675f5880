// Screen: the fast pass of the search, and the decisions that it leaves open.
//
// One block: 32 to 256 rows of x against all K codes, in tiles of 64 (mma.sync) or 128 (wgmma, sm_90a).
//   registers     the products of a warp's 16 or 32 rows and a tile's codes; of each of a thread's rows the threshold
//                 and the best code that the thread has met
//   shared        the block's rows as float16; stages of codes, copied ahead; up to 16 candidates per row
// Each product gives a lower bound of the code's distance (bound.h); the least upper bound so far is the row's
// threshold. A tile whose least score excludes all of its codes for all rows is done with: two operations per score.
// Else, without a branch per score: a thread finds the code of its least score, by the minima of eight codes each; its
// upper bound lowers the threshold of the row's four threads, and it takes the place of the thread's best one. Seldom
// there is more to keep, a second code of the tile or the best one so far: such codes go to the row's list. Codes that
// the last threshold does not exclude are candidates, which decide.h decides between.
// A row belongs to one warp, so that only the stages wait for all warps. Where there are fewer rows than a GPU can work
// at, blocks share their codes, and MergeLists decides. Blocks without a row to search meet no code.
// Bytes: 4 N D read (float32), 8 N written, the packed codes from L2 once per block. Operations: 2 N K D on tensor
// cores, 2 N K in the epilogue and about as many where a tile has a new best code.
// The result does not depend on the order of the candidates, since float64 decides (distance.h). Proof: exactness.md.
// Sizes are guesses from the arithmetic, to be measured.
#pragma once

#include <utility>

#include "decide.h"
#include "loaded_tiles.h"
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
    typedef typename Scores::Products Products;
    typedef typename Scores::Slots Slots;
    static constexpr int kOwn = Scores::kOwn, kSlot = Scores::kSlot, kSlots = Scores::kSlots;

    struct Shared {
        union {
            typename Codes::Stage stages[Cores::kStages];
            typename Decisions::Shared decisions;  // afterwards
        };
        typename Rows::Shared rows;
        Candidates list[kRows];
        [[no_unique_address]] BarriersOf<Cores> barriers;
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
        if constexpr (Cores::kLoader) {
            block.template with_loader<kThreads>(
                [&](auto& loader) { load(loader, shared); }, [&](auto& workers) { search(workers, shared); });
        } else {
            search(block, shared);
        }
    }

private:
    // What a block searches: rows from `first`, and its share of the codes.
    struct Place {
        uint32_t part, h, share, first;
    };
    VQOPS_HOST_DEVICE Place place_of(int64_t block) const {
        const uint32_t part = uint32_t(block) / across(), h = part / uint32_t(shares);
        return {part, h, part - h * uint32_t(shares), uint32_t(block) % across() * kRows};
    }
    VQOPS_HOST_DEVICE Codes tiles_of(const Packed& codes, int64_t share) const {
        return {codes, in.K, rows().width(), share, shares};
    }

    template <class Block>
    VQOPS_HOST_DEVICE void load(Block& loader, Shared& shared) const {
        const auto [part, h, share, first] = place_of(loader.index);
        if (loader.any_in_block() && loader.is_loader())
            LoadedTiles<Cores>{tiles_of(packed.head(h), share)}.load(loader, shared.stages, shared.barriers);
    }

    template <class Block>
    VQOPS_HOST_DEVICE void search(Block& block, Shared& shared) const {
        const auto [part, h, share, first] = place_of(block.index);
        const Packed codes = packed.head(h);
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);  // [kRows, width] as row_tile.h places them
        rows().take(block, shared.rows, codes, x, h, first);
        block.for_threads_sync([](int) {});
        auto kept = block.template registers<Kept>();
        auto searched = block.template registers<int32_t>();
        block.for_threads([&](int t) {
            searched[t] = 0;
            for (int r = t; r < kRows; r += kThreads) {
                shared.list[r].clear(shared.rows.state[r]);
                searched[t] |= shared.rows.state[r] == kSearched;
            }
            VQOPS_UNROLL(4)
            for (int own = 0; own < kOwn; own++) {
                const bool has = shared.rows.state[Scores::row_of(t, own)] == kSearched;
                kept[t].threshold[own] = has ? kNoThreshold : -INFINITY;
                kept[t].lower[own] = INFINITY, kept[t].code[own] = -1;
            }
        });
        const float slack = slack_of_start(in.D);
        const auto keep = [&](auto& group, int code, const Constants* constants, auto& products) {
            keep_candidates(group, shared, kept, slack, code, constants, products);
        };
        if constexpr (Cores::kLoader) LoadedTiles<Cores>::start(block, shared.barriers);
        if (block.any_in_block(searched)) {
            const Codes tiles = tiles_of(codes, share);
            if constexpr (Cores::kLoader)
                LoadedTiles<Cores>{tiles}.each(block, shared.stages, shared.barriers, x, keep);
            else
                tiles.each(block, shared.stages, x, keep);
        }
        block.for_threads_sync([&](int t) {
            VQOPS_UNROLL(4)
            for (int own = 0; own < kOwn; own++) {
                Candidates& list = shared.list[Scores::row_of(t, own)];
                if (t % 4 == 0) list.threshold = ordered(kept[t].threshold[own]);
                if (kept[t].lower[own] <= kept[t].threshold[own])
                    add(block, list, kept[t].code[own], kept[t].lower[own]);
            }
        });
        if (shares == 1) Decisions{in, out}.run(block, shared.decisions, codes, shared.list, h, first);
        else
            block.for_threads([&](int t) {
                for (int r = t; r < kRows && first + r < in.N; r += kThreads)
                    out.lists[int64_t(part) * in.N + first + r] = shared.list[r];
            });
    }

    // A thread's rows. The threshold is that of the row's four threads.
    struct Kept {
        float threshold[kOwn], lower[kOwn];
        int32_t code[kOwn];  // of the least lower bound that the thread has met, where it may be the nearest
    };

    // The code of a thread's least score of a row.
    struct Found {
        float scores[kSlot];  // of its slot
        float lower, upper;
        int32_t code;
    };

    // body<own>() for a thread's rows: with an index known to the compiler all of them stay in registers.
    template <class Body>
    static VQOPS_HOST_DEVICE void each_own(const Body& body) {
        [&]<int... own>(std::integer_sequence<int, own...>) {
            (body.template operator()<own>(), ...);
        }(std::make_integer_sequence<int, kOwn>());
    }

    template <class Block>
    static VQOPS_HOST_DEVICE void add(Block& block, Candidates& list, int32_t code, float lower) {
        const int place = block.atomic_add(&list.count, 1);
        if (place < kCapacity) list.code[place] = code, list.lower[place] = lower;
    }

    static VQOPS_HOST_DEVICE float largest_of(const Constants* constants) {
        float largest = constants[0].largest;
        for (int i = 1; i < Cores::kCodes / kTile; i++) largest = fmaxf(largest, constants[i].largest);
        return largest;
    }

    static VQOPS_HOST_DEVICE float least_of(const Slots& least, int own) {
        float score = least.v[own][0];
        VQOPS_UNROLL(4)
        for (int slot = 1; slot < kSlots; slot++) score = fminf(score, least.v[own][slot]);
        return score;
    }

    template <class Block, class P, class K>
    VQOPS_HOST_DEVICE void keep_candidates(Block& block, Shared& shared, K& kept, float slack, int first,
                                           const Constants* constants, P& products) const {
        auto least = block.template registers<Slots>();
        auto found = block.template registers<Found>();
        auto wanted = block.template registers<int32_t>(), left = block.template registers<int32_t>();
        auto upper = block.template registers<float>();
        const float largest = largest_of(constants);
        const auto bound_of = [&](int t, int own) -> const RowBound& {
            return shared.rows.bound[Scores::row_of(t, own)];
        };
        const auto limit_of = [&](int t, int own) {
            return score_limit(kept[t].threshold[own], largest, bound_of(t, own));
        };
        block.for_threads([&](int t) {
            Scores::measure(t, shared.rows, constants, products[t], least[t]);
            left[t] = 0;
        });
        each_own([&]<int own>() {
            block.for_threads([&](int t) { wanted[t] = least_of(least[t], own) <= limit_of(t, own); });
            block.if_any_in_warp(wanted, [&] {
                block.for_threads([&](int t) {
                    find(t, own, first, constants, products[t], least[t], bound_of(t, own), slack, found[t]);
                    upper[t] = wanted[t] ? found[t].upper : INFINITY;
                });
                block.template shuffle_reduce<4>(upper, [](float a, float b) { return fminf(a, b); });
                block.for_threads([&](int t) {
                    kept[t].threshold[own] = fminf(kept[t].threshold[own], upper[t]);
                    const float limit = limit_of(t, own);
                    int below = 0;
                    VQOPS_UNROLL(8)
                    for (int i = 0; i < kSlot; i++) below += found[t].scores[i] <= limit;
                    VQOPS_UNROLL(4)
                    for (int slot = 0; slot < kSlots; slot++) below += least[t].v[own][slot] <= limit;
                    if (below > 2) left[t] |= 1 << own;  // more than the one code, of the one slot
                    if (found[t].lower > kept[t].threshold[own]) return;
                    if (kept[t].lower[own] <= kept[t].threshold[own]) {
                        add(block, shared.list[Scores::row_of(t, own)], kept[t].code[own], kept[t].lower[own]);
                        left[t] |= 1 << kOwn;
                    }
                    kept[t].lower[own] = found[t].lower, kept[t].code[own] = found[t].code;
                });
            });
        });
        block.if_any_in_warp(left, [&] {
            block.for_threads_syncwarp([&](int t) {
                Scores::each(t, products[t], [&](int own, int i, int c, float score) {
                    const int32_t code = first + i * kTile + c;
                    if (!(left[t] >> own & 1) || code == kept[t].code[own]) return;
                    const float lower = lower_bound(score, constants[i].radius[c], bound_of(t, own));
                    if (lower <= kept[t].threshold[own])
                        add(block, shared.list[Scores::row_of(t, own)], code, lower);
                });
            });
            block.for_threads_syncwarp([&](int t) {
                for (int own = 0; own < kOwn && t % 4 == 0; own++) {
                    Candidates& list = shared.list[Scores::row_of(t, own)];
                    list.threshold = ordered(kept[t].threshold[own]);
                    if (list.count > kCapacity / 2) list.drop_excluded();
                }
            });
            block.for_threads_syncwarp([&](int t) {  // of a row that takes no more
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++)
                    kept[t].threshold[own] = from_ordered(shared.list[Scores::row_of(t, own)].threshold);
            });
        });
    }

    static VQOPS_HOST_DEVICE void find(int t, int own, int first, const Constants* constants, Products& products,
                                       const Slots& least, const RowBound& bound, float slack, Found& found) {
        const float score = least_of(least, own);
        int slot = 0, place = 0;
        VQOPS_UNROLL(4)
        for (int s = 1; s < kSlots; s++) slot = least.v[own][s] == score ? s : slot;
        VQOPS_UNROLL(8)
        for (int i = 0; i < kSlot; i++) {
            float of_slot = Scores::at(products, own, 0, i);
            VQOPS_UNROLL(4)
            for (int s = 1; s < kSlots; s++) {
                const float other = Scores::at(products, own, s, i);
                of_slot = slot == s ? other : of_slot;
            }
            found.scores[i] = of_slot;
            place = of_slot == score ? i : place;
        }
        const int code = Scores::code_of(t, slot, place);
        const Constants& tile = constants[code / kTile];
        const float radius = tile.radius[code % kTile];
        found.code = first + code;
        found.lower = lower_bound(score, radius, bound);
        found.upper = upper_bound(found.lower, tile.start[code % kTile], slack, radius, bound);
    }
};

}  // namespace vqops::cuda
