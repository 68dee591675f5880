// The codes of a head on their way through shared memory to two warpgroups that take turns, copied by a loader.
//
// A stage is 128 codes by 64 dimensions, as they lie in the packed codebook: two bulk copies, and a third one of the
// constants behind the last dimensions. The loader fills a stage as soon as all warps have left it; one group
// multiplies a tile while the other one compares its own. No barrier of all threads. Bytes: as in code_tiles.h.
#pragma once

#include "code_tiles.h"

namespace vqops::cuda {

// Of a block with a loader, in its shared memory.
template <class Cores>
struct BarriersOf {
    Barrier full[Cores::kStages];   // the stage has landed
    Barrier empty[Cores::kStages];  // all warps have left it
};
template <class Cores>
    requires(!Cores::kLoader)
struct BarriersOf<Cores> {};

template <class Cores>
struct LoadedTiles {
    typedef CodeTiles<Cores, 64> Tiles;
    typedef typename Tiles::Stage Stage;
    typedef typename Tiles::Products Products;
    typedef BarriersOf<Cores> Barriers;
    static constexpr int kPieceBytes = kTile * 64 * 2, kConstantsBytes = Tiles::kStored * int(sizeof(Constants));

    Tiles tiles;

    // By the workers, before they meet the loader in any_in_block().
    template <class Block>
    static VQOPS_HOST_DEVICE void start(Block& block, Barriers& barriers) {
        for (int slot = 0; slot < Cores::kStages; slot++) {
            block.barrier_start(barriers.full[slot], 1);
            block.barrier_start(barriers.empty[slot], Cores::kThreads / 32);
        }
        block.barriers_started();
    }

    template <class Block>
    VQOPS_HOST_DEVICE void load(Block& block, Stage* stages, Barriers& barriers) const {
        const auto range = tiles.range();
        const int pieces = int(tiles.width / 64);
        Turn turn = {0, 1};  // a fresh barrier counts as one whose odd phase is over
        for (int tile = range.begin; tile < range.begin + range.count; tile++)
            for (int piece = 0; piece < pieces; piece++, turn.next()) {
                Stage& stage = stages[turn.slot];
                Barrier& full = barriers.full[turn.slot];
                const bool last = piece == pieces - 1;
                block.barrier_wait(barriers.empty[turn.slot], turn.phase);
                block.expect_bytes(full, Tiles::kStored * kPieceBytes + (last ? kConstantsBytes : 0));
                for (int i = 0; i < Tiles::kStored; i++) {
                    const int64_t codes = int64_t(tile * Tiles::kStored + i) * kTile;
                    block.bulk_copy(stage.codes + i * kTile * 64,
                                    tiles.packed.codes + codes * tiles.width + piece * kTile * 64, kPieceBytes, full);
                }
                if (last)
                    block.bulk_copy(stage.constants, tiles.packed.constants + tile * Tiles::kStored, kConstantsBytes,
                                    full);
            }
    }

    // As CodeTiles::each, by each of the two groups.
    template <class Block, class Use>
    VQOPS_HOST_DEVICE void each(Block& block, Stage* stages, Barriers& barriers, const uint16_t* x, Use use) const {
        const auto range = tiles.range();
        const int pieces = int(tiles.width / 64), end = range.begin + range.count;
        // Stages by which the second group is behind. It frees those that the first one needs for the rest of a tile.
        const int lag = pieces < Cores::kStages ? pieces : Cores::kStages - 1;
        block.each_group([&](auto& group) {
            auto products = group.template registers<Products>();
            Turn turn = {0, 0};
            if (group.group() == 1) group.give_turn();
            for (int tile = range.begin; tile < end; tile++) {
                int slot = 0;
                group.take_turn();
                for (int piece = 0; piece < pieces; piece++, turn.next()) {
                    group.barrier_wait(barriers.full[turn.slot], turn.phase);
                    const uint16_t* const rows = x + piece * Cores::kRows * 64;
                    const auto rows_of = [&](int g, int i) { return rows + Cores::group_row(g, i) * 64; };
                    group.wgmma_start(products, rows_of, stages[turn.slot].codes, piece != 0);
                    if (piece == lag - 1 && (group.group() == 0 || tile + 1 < end)) group.give_turn();
                    group.template wgmma_wait<1>(products);
                    if (piece > 0) group.barrier_arrive(barriers.empty[slot]);
                    slot = turn.slot;
                }
                group.template wgmma_wait<0>(products);
                use(group, tile * Cores::kCodes, stages[slot].constants, products);
                group.barrier_arrive(barriers.empty[slot]);
            }
        });
        block.for_threads_sync([](int) {});  // the stages are free for something else
    }

private:
    // The stage that is next, and the phase of its barriers, 0 or 1.
    struct Turn {
        int slot, phase;

        VQOPS_HOST_DEVICE void next() {
            slot = slot == Cores::kStages - 1 ? 0 : slot + 1;
            if (slot == 0) phase ^= 1;
        }
    };
};

}  // namespace vqops::cuda
