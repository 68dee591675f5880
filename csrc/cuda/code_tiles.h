// The codes of a head on their way through shared memory and the tensor cores, and their products with a block's rows.
//
// A stage is 64 or 128 codes by 64 dimensions, 128 codes where a code has 16 or 32. Stages are copied ahead of the
// products, by cp.async; one barrier per stage. Bytes: the packed codes once per block, from L2.
#pragma once

#include "codebook.h"
#include "cores.h"

namespace vqops::cuda {

template <class Cores, int kPiece>
struct CodeTiles {
    static constexpr int kThreads = Cores::kThreads, kRowTiles = Cores::kRowTiles, kCodeTiles = Cores::kCodes / 8;
    static constexpr int kTiles = kPiece < 64 ? 2 : 1;              // products of a stage, one after the other
    static constexpr int kStored = kTiles * Cores::kCodes / kTile;  // tiles of a stage, as they are stored
    static constexpr int kInFlight = Cores::kStages - Cores::kLag;
    // Blocks of an SM that registers shall suffice for. Where codes are short, shared memory does.
    static constexpr int kBlocksAtOnce = kPiece < 64 ? 3 : 1;
    static_assert(!Cores::kWarpgroups || kPiece == 64);

    struct alignas(1024) Stage {  // wgmma counts its swizzle from multiples of 1024
        uint16_t codes[kStored * kTile * kPiece];
        Constants constants[kStored];
    };
    typedef Accumulators<kRowTiles, kCodeTiles> Products;

    Packed packed;
    int64_t K, width;
    int64_t share, shares;  // which part of the codes, of how many

    // Whole products of this share, counted in kCodes or, of several a stage, in stages.
    struct Range {
        int begin, count;
    };
    VQOPS_HOST_DEVICE Range range() const {
        const int64_t groups = (tiles() + kTiles - 1) / kTiles, from = groups * share / shares;
        return {int(from), int(groups * (share + 1) / shares - from)};
    }

    // use(block, first, constants, products) for the products of all rows with Cores::kCodes codes from `first`.
    template <class Block, class Use>
    VQOPS_HOST_DEVICE void each(Block& block, Stage* stages, const uint16_t* x, Use use) const {
        const int pieces = kPiece < 64 ? 1 : int(width / kPiece);
        const auto [begin, count] = range();
        Next next = {0, 0, 0, packed.codes + begin * kStored * kTile * width, packed.constants + begin * kStored};
        for (int step = 0; step < kInFlight; step++) fetch(block, stages, next, count * pieces, pieces);
        if constexpr (Cores::kWarpgroups) by_warpgroups(block, stages, x, next, begin, count, pieces, use);
        else by_warps(block, stages, x, next, begin, count, pieces, use);
        block.for_threads_sync([](int) {});  // the stages are free for something else
    }

private:
    VQOPS_HOST_DEVICE int tiles() const { return int((K + Cores::kCodes - 1) / Cores::kCodes); }

    static constexpr int kWords = kTile * kPiece / 8;  // of 16 bytes, of a piece of a stored tile
    static constexpr int kConstants = sizeof(Constants) / 16;

    // The stage to be copied next, and where it lies in the packed codebook.
    struct Next {
        int step, slot, piece;
        const uint16_t* codes;       // of the group's first tile, first piece
        const Constants* constants;  // of its first tile
    };

    // The wait for all products of a tile stands behind the loop over its pieces: under a condition in it, ptxas would
    // wait for all of them at each piece (C7517).
    template <class Block, class Use>
    VQOPS_HOST_DEVICE void by_warpgroups(Block& block, Stage* stages, const uint16_t* x, Next& next, int begin,
                                         int count, int pieces, Use& use) const {
        auto products = block.template registers<Products>();
        int slot = 0;
        for (int tile = begin; tile < begin + count; tile++) {
            const Stage* stage = stages;
            for (int piece = 0; piece < pieces; piece++) {
                block.template cp_async_wait_sync<kInFlight - 1, true>();
                stage = stages + slot, slot = slot == Cores::kStages - 1 ? 0 : slot + 1;
                const uint16_t* const rows = x + piece * Cores::kRows * kPiece;
                const auto rows_of = [&](int group, int i) { return rows + Cores::group_row(group, i) * kPiece; };
                block.wgmma_start(products, rows_of, stage->codes, piece != 0);
                fetch(block, stages, next, count * pieces, pieces);
                block.template wgmma_wait<1>(products);
            }
            block.template wgmma_wait<0>(products);
            use(block, tile * Cores::kCodes, stage->constants, products);
        }
    }

    // A thread's place for ldmatrix in a piece of rows and of codes. A multiple of 8 rows on, the swizzle is the same;
    // another depth changes bits that it leaves alone.
    struct Places {
        int rows, codes;
    };

    template <class Block, class Use>
    VQOPS_HOST_DEVICE void by_warps(Block& block, Stage* stages, const uint16_t* x, Next& next, int begin, int count,
                                    int pieces, Use& use) const {
        auto products = block.template registers<Products>();
        auto a = block.template registers<FragmentA<kRowTiles>>();
        auto b = block.template registers<FragmentB<kCodeTiles>>();
        auto places = block.template registers<Places>();
        block.for_threads([&](int t) {
            const int lane = t % 32;
            places[t].rows = swizzled(Cores::row_of(t, 0) + lane % 16, lane / 16 * 8, kPiece);
            places[t].codes = swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2 * 8, kPiece);
        });
        const auto load_rows = [&](const uint16_t* rows, int depth) {
            VQOPS_UNROLL(2)
            for (int i = 0; i < kRowTiles; i++)
                block.ldmatrix([&](int t) { return rows + (places[t].rows ^ depth) + i * 16 * kPiece; },
                               [&](int t) { return a[t].v[i]; });
        };
        const auto load_codes = [&](const uint16_t* codes, int depth) {
            VQOPS_UNROLL(4)
            for (int j = 0; j < kCodeTiles / 2; j++)
                block.ldmatrix([&](int t) { return codes + (places[t].codes ^ depth) + j * 16 * kPiece; },
                               [&](int t) { return b[t].v[j]; });
        };
        for (int tile = begin * kTiles, group = 0; group < count; group++, tile += kTiles)
            for (int piece = 0; piece < pieces; piece++) {
                block.template cp_async_wait_sync<kInFlight - 1, false>();
                static_assert(Cores::kLag == 1);
                // The one that is not ahead.
                const Stage& stage = stages[next.slot == Cores::kStages - 1 ? 0 : next.slot + 1];
                fetch(block, stages, next, count * pieces, pieces);
                for (int i = 0; i < kTiles && tile + i < tiles(); i++) {
                    VQOPS_UNROLL(4)
                    for (int depth = 0; depth < kPiece; depth += 16) {
                        load_rows(x + piece * Cores::kRows * kPiece, depth);
                        load_codes(stage.codes + i * kTile * kPiece, depth);
                        block.mma_m16n8k16(products, a, b, piece > 0 || depth > 0);
                    }
                    if (piece == pieces - 1)
                        use(block, (tile + i) * Cores::kCodes, stage.constants + i * Cores::kCodes / kTile, products);
                }
            }
    }

    template <class Block>
    VQOPS_HOST_DEVICE void fetch(Block& block, Stage* stages, Next& next, int steps, int pieces) const {
        if (next.step < steps) {
            Stage& stage = stages[next.slot];
            const bool last = next.piece == pieces - 1;
            const uint16_t* const piece = next.codes + next.piece * kWords * 8;
            block.for_threads([&](int t) {
                VQOPS_UNROLL(16)
                for (int i = 0; i < kStored * kWords; i += kThreads) {
                    const int word = i + t, tile = word / kWords;
                    block.cp_async(stage.codes + word * 8, piece + (tile * (pieces - 1) * kWords + word) * 8);
                }
                for (int i = 0; i < kStored * kConstants && last; i += kThreads) {
                    const int word = i + t;
                    char* const to = reinterpret_cast<char*>(stage.constants);
                    const char* const from = reinterpret_cast<const char*>(next.constants);
                    if (word < kStored * kConstants) block.cp_async(to + word * 16, from + word * 16);
                }
            });
            next.step++;
            next.piece = last ? 0 : next.piece + 1;
            if (last) next.codes += kStored * kTile * width, next.constants += kStored;
        }
        next.slot = next.slot == Cores::kStages - 1 ? 0 : next.slot + 1;
        block.cp_async_commit();
    }
};

}  // namespace vqops::cuda
