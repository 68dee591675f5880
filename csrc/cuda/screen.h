// Screen: the fast pass of the search, and the decisions that it leaves open. Never run on a GPU.
//
// One block: 128 rows of x (64 where D or the GPU's memory wants it) against all K codes, in tiles of 64.
//   registers     the products of 32 rows and 64 codes a warp, 64 floats a thread; the next part of a tile on its way
//   shared        the block's rows as float16; a tile's codes, 64 dimensions at a time; up to 16 candidates a row
//   tensor cores  mma.sync, which every GPU from sm_80 has
// Each product gives a lower and an upper bound of the code's distance (bound.h). The least upper bound so far is the
// row's threshold; codes whose lower bound does not exceed it are candidates. Rows left with one are done; the others
// are decided in float64, eight threads a pair. Rows with too many go to Exhaustive by way of a list.
// Bytes: 4 N D read (float32), 8 N written, the packed codes from L2 once a block. Operations: 2 N K D on tensor cores,
// about 6 N K in the epilogue.
// The result does not depend on the order of the candidates, since float64 decides (distance.h). Proof: exactness.md.
// Sizes are guesses from the arithmetic, to be measured.
#pragma once

#include "search_inputs.h"

namespace vqops::cuda {

template <class T, int kRowTiles>
struct Screen {
    static constexpr int kThreads = 128, kRows = 4 * 16 * kRowTiles, kCodeTiles = kTileCodes / 8;
    static constexpr int kStep = 64;       // dimensions of a tile in shared memory
    static constexpr int kStride = kStep + 8;  // the eight rows of a fragment in different banks
    static constexpr int kCapacity = 16;   // random and clustered data leave 1 to 3 candidates
    static constexpr int kPairs = kThreads / kLanes;

    struct alignas(16) Word {
        uint32_t v[4];
    };
    struct Words {
        Word v[4];
    };
    enum State : int32_t { kSearched, kOutside, kLeft };

    struct Shared {
        alignas(16) uint16_t codes[kTileCodes][kStride];
        float start[kTileCodes], slack[kTileCodes], radius[kTileCodes], unit[kTileCodes];
        RowBound bound[kRows];
        float row_unit[kRows];
        State state[kRows];
        int32_t threshold[kRows];  // ordered(upper bound)
        int32_t count[kRows];      // more than kCapacity: not all are held
        int32_t code[kRows][kCapacity];
        float lower[kRows][kCapacity];
        double best[kRows], cost[kPairs];
        int32_t best_code[kRows], pairs;
        uint16_t pair[kRows * kCapacity];
    };

    SearchInputs<T> in;
    SearchOutputs out;
    Preparation packed;

    VQOPS_HOST_DEVICE int64_t width() const { return padded(in.D); }
    VQOPS_HOST_DEVICE int64_t row_stride() const { return width() + 8; }
    size_t shared_bytes() const { return sizeof(Shared) + size_t(kRows * row_stride() * 2); }
    VQOPS_HOST_DEVICE uint32_t across() const { return uint32_t((in.N + kRows - 1) / kRows); }
    int64_t blocks() const { return in.H * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t h = uint32_t(block.index) / across(), first = int64_t(uint32_t(block.index) % across()) * kRows;
        const Packed codes = packed.head(h);
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);  // [kRows, row_stride]
        take_rows(block, shared, codes, x, h, first);
        screen(block, shared, codes, x);
        decide(block, shared, h, first);
    }

private:
    // The rows, centred, scaled and rounded, with their bounds; eight threads a row.
    template <class Block>
    VQOPS_HOST_DEVICE void take_rows(Block& block, Shared& shared, const Packed& codes, uint16_t* x, int64_t h,
                                     int64_t first) const {
        auto square = block.template registers<double>(), lost = block.template registers<double>();
        for (int top = 0; top < kRows; top += kThreads / kLanes) {
            const auto row_of = [&](int t) { return top + t / kLanes; };
            const auto exists = [&](int t) { return first + row_of(t) < in.N && in.mask.keeps(h, first + row_of(t)); };
            const auto value = [&](int t, int64_t i) {
                const double given = in.x.at(in.x.offset(h, first + row_of(t)), i);
                return in.cosine ? given : (given - codes.centre[i]) * double(*codes.scale);
            };
            block.own([&](int t) {
                square[t] = 0;
                VQOPS_UNROLL(8)
                for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                    const double v = exists(t) ? value(t, i) : 0.0;
                    square[t] += v * v;
                }
            });
            block.template sum<kLanes>(square);
            // A cosine does not change with the row's length, which becomes about 1.
            const auto scale = [&](int t) {
                return in.cosine && square[t] > 0 ? clamped_power(-exponent_of(std::sqrt(square[t]))) : 1.0;
            };
            const auto norm = [&](int t) { return std::sqrt(square[t]) * scale(t); };
            const auto near = [&](int t) { return norm(t) <= kFarRow; };
            block.own([&](int t) {
                const int exponent = near(t) ? unit_exponent(norm(t)) : 0;
                const double shrink = power_of_two(-exponent) * scale(t);
                lost[t] = 0;
                VQOPS_UNROLL(8)
                for (int64_t i = t % kLanes; i < width(); i += kLanes) {
                    const double scaled = exists(t) && near(t) && i < in.D ? value(t, i) * shrink : 0.0;
                    const Float16 half = rounded<Float16>(scaled);
                    const double e = scaled - real(half);
                    lost[t] += e * e;
                    x[row_of(t) * row_stride() + i] = half.bits;
                }
            });
            block.template sum<kLanes>(lost);
            block.own([&](int t) {
                if (t % kLanes != 0) return;
                const int r = row_of(t);
                const bool searched = exists(t) && near(t);
                const double unit = searched ? power_of_two(unit_exponent(norm(t))) : 0.0;
                const double error = std::sqrt(lost[t]) * unit * (1 + 0x1p-40);
                shared.state[r] = searched ? kSearched : exists(t) ? kLeft : kOutside;
                shared.row_unit[r] = float(unit);
                shared.bound[r] = searched ? row_bound(norm(t), error, *codes.worst, in.D, in.cosine) : RowBound{};
                shared.threshold[r] = ordered(searched ? kAbsentStart * 0x1p-10f : -INFINITY);
                shared.count[r] = 0;
                if (r == 0) shared.pairs = 0;
            });
        }
        block.each([](int) {});
    }

    static VQOPS_HOST_DEVICE double clamped_power(int exponent) {
        return power_of_two(exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent);
    }

    // Leaves the candidates of each row.
    template <class Block>
    VQOPS_HOST_DEVICE void screen(Block& block, Shared& shared, const Packed& codes, const uint16_t* x) const {
        const int depth = width() < kStep ? int(width()) : kStep, words = depth / 8;  // of a code
        const int parts = int(width() / depth), tiles = int(round_up(in.K, kTileCodes) / kTileCodes);
        auto ahead = block.template registers<Words>();
        auto products = block.template registers<Products<kRowTiles, kCodeTiles>>();
        auto left = block.template registers<Left<kRowTiles>>();
        auto right = block.template registers<Right<kCodeTiles>>();
        const auto fetch = [&](int tile, int part) {
            block.own([&](int t) {
                VQOPS_UNROLL(4)
                for (int j = 0; j < 4; j++) {
                    const int word = t + j * kThreads;
                    if (word >= kTileCodes * words) break;
                    const int64_t code = int64_t(tile) * kTileCodes + word / words;
                    const uint16_t* const from = codes.codes + code * width() + part * depth + word % words * 8;
                    ahead[t].v[j] = *reinterpret_cast<const Word*>(from);
                }
            });
        };
        fetch(0, 0);
        for (int tile = 0; tile < tiles; tile++) {
            for (int part = 0; part < parts; part++) {
                block.each([&](int t) {
                    VQOPS_UNROLL(4)
                    for (int j = 0; j < 4; j++) {
                        const int word = t + j * kThreads;
                        if (word < kTileCodes * words)
                            *reinterpret_cast<Word*>(&shared.codes[word / words][word % words * 8]) = ahead[t].v[j];
                    }
                    if (part != 0) return;
                    products[t] = {};
                    if (t >= kTileCodes) return;
                    const int64_t code = int64_t(tile) * kTileCodes + t;
                    shared.start[t] = codes.start[code], shared.slack[t] = codes.slack[code];
                    shared.radius[t] = codes.radius[code], shared.unit[t] = codes.unit[code];
                });
                if (part + 1 < parts) fetch(tile, part + 1);
                else if (tile + 1 < tiles) fetch(tile + 1, 0);
                for (int step = 0; step < depth; step += 16) {
                    const int64_t from = part * depth + step;
                    block.own([&](int t) { take_fragments(shared, x, t, from, step, left[t], right[t]); });
                    block.multiply_add(products, left, right);
                }
                if (part + 1 < parts) block.each([](int) {});
            }
            block.each([&](int t) { lower_thresholds(block, shared, t, products[t]); });
            block.each([&](int t) { keep(block, shared, t, tile, products[t]); });
            block.each([&](int t) {
                if (t < kRows && shared.count[t] > kCapacity / 2) drop_excluded(shared, t);
            });
        }
    }

    static VQOPS_HOST_DEVICE uint32_t two(const uint16_t* place) { return *reinterpret_cast<const uint32_t*>(place); }

    VQOPS_HOST_DEVICE void take_fragments(const Shared& shared, const uint16_t* x, int t, int64_t x_depth, int depth,
                                          Left<kRowTiles>& left, Right<kCodeTiles>& right) const {
        const int g = t % 32 / 4, d = t % 4 * 2;
        VQOPS_UNROLL(2)
        for (int i = 0; i < kRowTiles; i++) {
            const uint16_t* const place = x + (row_of(t, i) + g) * row_stride() + x_depth + d;
            left.v[i][0] = two(place), left.v[i][1] = two(place + 8 * row_stride());
            left.v[i][2] = two(place + 8), left.v[i][3] = two(place + 8 * row_stride() + 8);
        }
        VQOPS_UNROLL(8)
        for (int j = 0; j < kCodeTiles; j++) {
            const uint16_t* const place = &shared.codes[j * 8 + g][depth + d];
            right.v[j][0] = two(place), right.v[j][1] = two(place + 8);
        }
    }

    // The first row of a warp's row tile i.
    static VQOPS_HOST_DEVICE int row_of(int t, int i) { return t / 32 * 16 * kRowTiles + 16 * i; }

    // Products become lower bounds; the least upper bounds lower the rows' thresholds.
    template <class Block>
    VQOPS_HOST_DEVICE void lower_thresholds(Block& block, Shared& shared, int t,
                                            Products<kRowTiles, kCodeTiles>& products) const {
        VQOPS_UNROLL(2)
        for (int i = 0; i < kRowTiles; i++)
            VQOPS_UNROLL(2)
            for (int half = 0; half < 2; half++) {
                const int r = row_of(t, i) + t % 32 / 4 + 8 * half;
                const RowBound bound = shared.bound[r];
                const float row_unit = shared.row_unit[r];
                float least = INFINITY;
                VQOPS_UNROLL(8)
                for (int j = 0; j < kCodeTiles; j++)
                    VQOPS_UNROLL(2)
                    for (int e = 0; e < 2; e++) {
                        const int c = j * 8 + t % 4 * 2 + e;
                        float& value = products.v[i][j][2 * half + e];
                        value = lower_bound(value, row_unit * shared.unit[c], shared.start[c], shared.radius[c],
                                            bound.radius);
                        least = fminf(least, upper_bound(value, shared.slack[c], shared.radius[c], bound));
                    }
                block.lower(&shared.threshold[r], ordered(least));
            }
    }

    template <class Block>
    VQOPS_HOST_DEVICE void keep(Block& block, Shared& shared, int t, int tile,
                                const Products<kRowTiles, kCodeTiles>& lower) const {
        VQOPS_UNROLL(2)
        for (int i = 0; i < kRowTiles; i++)
            VQOPS_UNROLL(2)
            for (int half = 0; half < 2; half++) {
                const int r = row_of(t, i) + t % 32 / 4 + 8 * half;
                const float threshold = from_ordered(shared.threshold[r]);
                VQOPS_UNROLL(8)
                for (int j = 0; j < kCodeTiles; j++)
                    VQOPS_UNROLL(2)
                    for (int e = 0; e < 2; e++) {
                        const float value = lower.v[i][j][2 * half + e];
                        if (value > threshold) continue;
                        const int place = block.fetch_add(&shared.count[r], 1);
                        if (place >= kCapacity) continue;
                        shared.code[r][place] = tile * kTileCodes + j * 8 + t % 4 * 2 + e;
                        shared.lower[r][place] = value;
                    }
            }
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
        block.each([&](int r) {
            if (r >= kRows || shared.state[r] != kSearched) return;
            drop_excluded(shared, r);
            const int count = shared.count[r];
            shared.best_code[r] = count == 1 ? shared.code[r][0] : -1;
            if (count > kCapacity) shared.state[r] = kLeft;
            if (count < 2 || count > kCapacity) return;
            const int place = block.fetch_add(&shared.pairs, count);
            for (int i = 0; i < count; i++) shared.pair[place + i] = uint16_t(r * kCapacity + i);
        });
        const int pairs = shared.pairs;
        auto sums = block.template registers<Doubles<2>>();
        for (int base = 0; base < pairs; base += kPairs) {
            block.own([&](int t) {
                sums[t].v[0] = sums[t].v[1] = 0;
                if (base + t / kLanes >= pairs) return;
                const int pair = shared.pair[base + t / kLanes], r = pair / kCapacity;
                const int64_t code = in.codebook.offset(h, shared.code[r][pair % kCapacity]);
                add_lane(in, in.x.offset(h, first + r), code, t % kLanes, sums[t].v);
            });
            block.template sum<kLanes>(sums);
            block.each([&](int t) {
                if (t % kLanes == 0)
                    shared.cost[t / kLanes] = in.cosine ? cosine_cost(sums[t].v[0], sums[t].v[1]) : sums[t].v[0];
            });
            block.each([&](int t) {
                for (int p = 0; p < kPairs && base + p < pairs && t == 0; p++) {
                    const int pair = shared.pair[base + p], r = pair / kCapacity;
                    const int32_t code = shared.code[r][pair % kCapacity];
                    if (!before(shared.cost[p], code, shared.best[r], shared.best_code[r])) continue;
                    shared.best[r] = shared.cost[p], shared.best_code[r] = code;
                }
            });
        }
        block.own([&](int r) {
            if (r >= kRows || first + r >= in.N) return;
            const State state = shared.state[r];
            if (state == kLeft) {
                out.left[h * in.N + block.fetch_add(&out.how_many[h], 1)] = uint32_t(first + r);
                return;
            }
            out.indices[h * in.N + first + r] = state == kOutside ? -1 : shared.best_code[r];
            if (!out.tiers) return;
            const bool none = state == kOutside || shared.count[r] == 0;
            block.fetch_add(&out.tiers[none ? kNoCode : shared.count[r] == 1 ? kCertified : kDecided], Count(1));
        });
    }
};

}  // namespace vqops::cuda
