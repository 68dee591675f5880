// Scores: the lower bounds that a thread makes of its products, and the row and code that each belongs to.
#pragma once

#include "code_tiles.h"
#include "row_tile.h"

namespace vqops::cuda {

template <class Cores>
struct ScoresOf {
    static constexpr int kCodeTiles = Cores::kCodes / 8;
    static constexpr int kOwn = 2 * Cores::kRowTiles;  // rows that a thread has products of
    typedef Accumulators<Cores::kRowTiles, kCodeTiles> Products;

    // Of the block's rows. All of a row's products lie in four neighbouring threads.
    static VQOPS_HOST_DEVICE int row_of(int t, int own) { return Cores::row_of(t, own / 2) + t % 32 / 4 + own % 2 * 8; }

    // body(own, stored tile, code of it, product) for all of a thread's products.
    template <class Body>
    static VQOPS_HOST_DEVICE void each(int t, Products& products, Body body) {
        VQOPS_UNROLL(16)
        for (int j = 0; j < kCodeTiles; j++)
            VQOPS_UNROLL(2)
            for (int e = 0; e < 2; e++) {
                const int c = j * 8 % kTile + t % 4 * 2 + e;
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++)
                    body(own, j * 8 / kTile, c, products.v[own / 2][j][own % 2 * 2 + e]);
            }
    }

    // A thread's codes by eights, all of one stored tile.
    static constexpr int kSlot = 8, kSlots = 2 * kCodeTiles / kSlot;
    struct Slots {
        float v[kOwn][kSlots];
    };
    static VQOPS_HOST_DEVICE int tile_of(int slot) { return slot * 4 * 8 / kTile; }

    // Code i of a slot, of those of the product.
    static VQOPS_HOST_DEVICE int code_of(int t, int slot, int i) { return (slot * 4 + i / 2) * 8 + t % 4 * 2 + i % 2; }
    // The place of codes i and i + 1, i even, among the twos of their tile: the thread's part of it is the same for all.
    static VQOPS_HOST_DEVICE int two_of(int t, int slot, int i) { return (slot * 4 + i / 2) * 8 % kTile / 2 + t % 4; }
    static VQOPS_HOST_DEVICE float& at(Products& products, int own, int slot, int i) {
        return products.v[own / 2][slot * 4 + i / 2][own % 2 * 2 + i % 2];
    }

    // Products become scores (bound.h); least: of each own row, by slots. Two operations per score.
    template <class Rows>
    static VQOPS_HOST_DEVICE void measure(int t, const Rows& rows, const Constants* constants, Products& products,
                                          Slots& least) {
        VQOPS_UNROLL(4)
        for (int slot = 0; slot < kSlots; slot++) {
            const Constants& tile = constants[tile_of(slot)];
            Floats<kOwn> unit;
            VQOPS_UNROLL(4)
            for (int own = 0; own < kOwn; own++) unit.v[own] = rows.unit[row_of(t, own)] * tile.unit;
            VQOPS_UNROLL(4)
            for (int i = 0; i < kSlot; i += 2) {
                const auto starts = tile.start.two[two_of(t, slot, i)];
                VQOPS_UNROLL(2)
                for (int e = 0; e < 2; e++)
                    VQOPS_UNROLL(4)
                    for (int own = 0; own < kOwn; own++) {
                        float& score = at(products, own, slot, i + e);
                        score = score_of(score, unit.v[own], starts.v[e]);
                        least.v[own][slot] = i + e == 0 ? score : fminf(least.v[own][slot], score);
                    }
            }
        }
    }

    // Products become lower bounds, where repeats count; least: of each own row. Three operations per score.
    template <class Rows>
    static VQOPS_HOST_DEVICE void bound(int t, const Rows& rows, const Constants* constants, Products& products,
                                        Floats<kOwn>& least) {
        VQOPS_UNROLL(4)
        for (int slot = 0; slot < kSlots; slot++) {
            const Constants& tile = constants[tile_of(slot)];
            VQOPS_UNROLL(4)
            for (int i = 0; i < kSlot; i += 2) {
                const int place = two_of(t, slot, i);
                const auto starts = tile.start_topk.two[place], radii = tile.radius.two[place];
                VQOPS_UNROLL(2)
                for (int e = 0; e < 2; e++)
                    VQOPS_UNROLL(4)
                    for (int own = 0; own < kOwn; own++) {
                        const int r = row_of(t, own);
                        float& value = at(products, own, slot, i + e);
                        value = score_of(value, rows.unit[r] * tile.unit, starts.v[e]);
                        value = lower_bound(value, radii.v[e], rows.bound[r]);
                        least.v[own] = slot + i + e == 0 ? value : fminf(least.v[own], value);
                    }
            }
        }
    }
};

}  // namespace vqops::cuda
