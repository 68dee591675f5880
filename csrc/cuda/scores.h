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

    // Products become lower bounds; least: of each own row. Four operations per score.
    template <class Rows>
    static VQOPS_HOST_DEVICE void bound(int t, const Rows& rows, const Constants* constants, Products& products,
                                        Floats<kOwn>& least) {
        Floats<kOwn> unit, radius;
        VQOPS_UNROLL(4)
        for (int own = 0; own < kOwn; own++) {
            const int r = row_of(t, own);
            unit.v[own] = rows.unit[r], radius.v[own] = rows.bound[r].radius;
            least.v[own] = INFINITY;
        }
        VQOPS_UNROLL(16)
        for (int j = 0; j < kCodeTiles; j++) {
            const Constants& tile = constants[j * 8 / kTile];
            const int place = j * 8 % kTile / 2 + t % 4;
            const auto starts = tile.start.two[place], radii = tile.radius.two[place], units = tile.unit.two[place];
            VQOPS_UNROLL(2)
            for (int e = 0; e < 2; e++)
                VQOPS_UNROLL(4)
                for (int own = 0; own < kOwn; own++) {
                    float& value = products.v[own / 2][j][own % 2 * 2 + e];
                    value = lower_bound(value, unit.v[own] * units.v[e], starts.v[e], radii.v[e], radius.v[own]);
                    least.v[own] = fminf(least.v[own], value);
                }
        }
    }
};

}  // namespace vqops::cuda
