// The screening pass in matrix tiles: 16 codes against 16 rows, 32 dimensions an instruction, in bfloat16. A set says
//   kName, kWorth, kLayout                     see instructions.h
//   Vector, load, store, broadcast             sixteen floats
//   not_above, square_root, transpose          of them
//   halves, widened                            to and from bfloat16
//   configure, release                         the tiles, for the time of a call
//   zero<i>, load<i>, store<i>                 tile i, 16 lines of 64 bytes side by side
//   multiply<i, a, b>                          tile i += codes in tile a, rows in tile b
//
// Codes are operand A, as they lie: 16 lines of 32 dimensions. Rows are operand B, turned when they are placed: 16 lines
// of pairs of dimensions, a pair of each row. So a line of a product is one code against 16 rows, and what follows it,
// minimum, threshold and bounds, is vertical and without branches.
//
// The least of a tile of codes stands for all of them: its upper bound lowers the rows' thresholds, and the tile is
// noted where it may hold a code below one. After all codes of a chunk the tiles that the thresholds leave open then,
// about one of a row, are computed once more and their codes read off.
//
// A vector is hi + lo, two bfloat16. Two tiers (docs/exactness.md): hi.hi, one product, then for the rows that this
// leaves many open tiles hi.hi + hi.lo + lo.hi, three. Up to kFoldedD dimensions these three, and the sums' first value
// as three bfloat16 more, are a single step of 32 dimensions, and the only tier.

#include "tile_layout.inl"
#include "tile_work.inl"
#include "tile_pass.inl"

template <class Set>
struct TileKernels : TileWork {
    typedef TilePass<Set> Pass;
    typedef typename Set::Vector Vector;
    typedef int32_t Whole __attribute__((vector_size(64)));

    static constexpr int32_t kFewTiles = 4;  // open ones that a row of the first tier may have, a code wanted
    // Cycles, on a Xeon of 2023: of a product of a step, of what follows those of 32 codes and rows, of a tile that is
    // computed once more and read. They decide what the second tier is worth.
    static constexpr int64_t kStepCost = 16, kPassCost = 120, kOpenCost = 170;

    // Says which are open to which rows, now that the thresholds are known, and counts those of each row.
    template <Tier tier>
    static void mark_open(const Work& work, const Block& block, const Part& part) {
        for (int64_t g = 0; g < block.count; g++) {
            Noted& noted = block.noted[g];
            const Vector threshold = Set::load(block.threshold + g * kTile);
            Whole open = {};
            for (int64_t i = 0; i < noted.count; i++) {
                const Vector limit = threshold + Pass::template width_at<tier>(work, block, g, noted.pair[i], part.D);
                for (int t = 0; t < 2; t++) {
                    const Vector least = Set::load(noted.least[i][t]);
                    noted.rows[i][t] = uint16_t(Set::not_above(least, limit));
                    open -= least <= limit;
                }
            }
            *reinterpret_cast<Whole*>(noted.open) = open;
        }
    }

    // The rows of a group that are to be looked at in its open tiles. Those with more of them than a list holds are
    // given up.
    VQOPS_INLINE unsigned few_open(const Block& block, int64_t group, const OpenCodes& open) {
        unsigned rows = 0;
        const Noted& noted = block.noted[group];
        for (int64_t r = 0; r < kTile; r++) {
            const int64_t row = block.row[group * kTile + r];
            if (noted.open[r] > open.capacity) open.too_many(open.owner, row);
            else rows |= unsigned(noted.open[r] > 0) << r;
        }
        return rows;
    }

    struct OpenTile {
        const char *rows, *codes;  // operands
        int64_t group, pair;
        int32_t tile;              // of the pair
        unsigned mask;             // of the rows
    };

    template <Tier tier, int i>
    VQOPS_INLINE void multiply_open(Work& work, const OpenTile& tile, const Part& part) {
        const int64_t steps = steps_of(part.D);
        Set::template zero<i>();
        const auto add = [&](const char* codes, const char* rows) {
            for (int64_t step = 0; step < steps; step++) {
                Set::template load<4>(codes + step * kBytes);
                Set::template load<6>(rows + step * kBytes);
                Set::template multiply<i, 4, 6>();
            }
        };
        add(tile.codes, tile.rows);
        if constexpr (tier == kThree) {
            add(tile.codes + 2 * steps * kBytes, tile.rows);
            add(tile.codes, tile.rows + steps * kBytes);
        }
        Set::template store<i>(work.sums + i * kSums);
    }

    // Hands on the codes of a tile below the thresholds. Here `start` is added last, which is within the same bounds.
    template <Tier tier>
    static void read_open(const Work& work, const float* sums, const Block& block, const Part& part,
                          const OpenTile& tile, const OpenCodes& open) {
        const Vector width = Pass::template width_at<tier>(work, block, tile.group, tile.pair, part.D);
        const Vector limit = Set::load(block.threshold + tile.group * kTile) + width;
        const int64_t first = tile.pair * kPair + tile.tile * kTile;
        const int64_t real = open.codes - (part.first * kPair + first);  // the others are padding
        if (real <= 0) return;
        alignas(64) float widths[kTile];
        alignas(64) int32_t below[kTile];
        Whole found = {};
        VQOPS_UNROLL_ALL
        for (int j = 0; j < kTile; j++) {
            const Vector value = Set::load(sums + j * kTile) + Set::broadcast(added<tier>(part, first + j));
            found |= (value <= limit) & (Whole{} + (1 << j));
        }
        if (real < kTile) found &= Whole{} + ((1 << real) - 1);
        *reinterpret_cast<Whole*>(below) = found;
        Set::store(widths, width);
        for (unsigned mask = tile.mask; mask; mask &= mask - 1) {
            const int r = __builtin_ctz(mask);
            const int64_t row = block.row[tile.group * kTile + r];
            for (unsigned left = unsigned(below[r]); left; left &= left - 1) {
                const int64_t j = __builtin_ctz(left), code = part.first * kPair + first + j;
                const float value = sums[j * kTile + r] + added<tier>(part, first + j);
                if (!open.candidate) {
                    list(code, row, value - widths[r], open);
                    continue;
                }
                const float slack = part.slack[first + j] + open.rest[row];
                open.candidate(open.owner, row, code, value - widths[r], value + (widths[r] + slack));
            }
        }
    }

    // To a sum that began with zero.
    template <Tier tier>
    VQOPS_INLINE float added(const Part& part, int64_t code) {
        return tier == kFolded ? 0 : start_of(part.start[code]);
    }

    VQOPS_INLINE void list(int64_t code, int64_t row, float lower, const OpenCodes& open) {
        const int32_t count = open.count[row];
        if (count < 0) return;  // given up
        open.code[row * open.room + count] = int32_t(code);
        open.lower[row * open.room + count] = lower;
        open.count[row] = count + 1;
        if (count + 1 >= open.capacity) open.full(open.owner, row);
    }

    // Computes the open tiles once more, four at a time.
    template <Tier tier>
    static void look_again(Work& work, const Block& block, const Part& part, const OpenCodes& open) {
        const int64_t steps = steps_of(part.D);
        OpenTile tiles[4];
        int count = 0;
        const auto read_all = [&] {
            multiply_open<tier, 0>(work, tiles[0], part);
            if (count > 1) multiply_open<tier, 1>(work, tiles[1], part);
            if (count > 2) multiply_open<tier, 2>(work, tiles[2], part);
            if (count > 3) multiply_open<tier, 3>(work, tiles[3], part);
            for (int i = 0; i < count; i++) read_open<tier>(work, work.sums + i * kSums, block, part, tiles[i], open);
            count = 0;
        };
        for (int64_t g = 0; g < block.count; g++) {
            const Noted& noted = block.noted[g];
            const unsigned rows = few_open(block, g, open);
            for (int64_t i = 0; rows && i < noted.count; i++) {
                const int64_t pair = noted.pair[i];
                for (int32_t t = 0; t < 2; t++) {
                    const unsigned mask = rows & noted.rows[i][t];
                    if (!mask) continue;
                    const char* codes = part.panel + pair * panel_bytes(part.D) + t * steps * kBytes;
                    tiles[count++] = {block.groups + g * group_bytes(part.D), codes, g, pair, t, mask};
                    if (count == 4) read_all();
                }
            }
        }
        if (count > 0) read_all();
    }

    // ---- Tiers.

    // Rows that the first tier leaves so many open tiles that three products are cheaper than these; they are taken out.
    static int64_t take_late(Work& work, const Block& block, const Part& part, const OpenCodes& open) {
        int64_t late = 0, tiles = 0;
        for (int64_t g = 0; g < block.count; g++)
            for (int64_t r = 0; r < kTile; r++) {
                const int32_t left = block.noted[g].open[r];
                if (left <= kFewTiles * work.wanted) continue;
                work.late_of_all[late++] = int32_t(g * kTile + r);
                tiles += left < open.capacity ? left : open.capacity;
            }
        const int64_t steps = steps_of(part.D), passes = (late + kPair - 1) / kPair;
        const int64_t looking = tiles * (kOpenCost + steps * kStepCost);
        if (looking <= passes * part.count * (12 * steps * kStepCost + kPassCost)) return 0;
        for (int64_t i = 0; i < late; i++) {
            const int32_t row = work.late_of_all[i];
            block.noted[row / kTile].open[row % kTile] = 0;
        }
        return late;
    }

    // Rows of the first tier side by side, with whole pairs of groups, lo turned as well.
    static Block gather(Work& work, const Block& block, const int32_t* rows, int64_t count, int64_t D) {
        const int64_t size = group_bytes(D), steps = steps_of(D), padded = (count + kPair - 1) / kPair * kPair;
        for (int64_t first = 0; first < padded; first += kTile) {
            char* const to = work.late + first / kTile * size;
            RowBounds& bounds = *reinterpret_cast<RowBounds*>(to + vectors_bytes(D));
            for (int64_t i = first; i < first + kTile; i++) {
                const int64_t row = rows[i < count ? i : 0], r = row % kTile;  // any, where there is none
                const char* from = block.groups + row / kTile * size;
                const auto* turned = reinterpret_cast<const uint32_t*>(from);
                for (int64_t line = 0; line < steps * kTile; line++)
                    reinterpret_cast<uint32_t*>(to)[line * kTile + i - first] = turned[line * kTile + r];
                for (int64_t step = steps; step < 2 * steps; step++)
                    __builtin_memcpy(to + step * kBytes + (i - first) * 64, from + step * kBytes + r * 64, 64);
                const auto& of_row = *reinterpret_cast<const RowBounds*>(from + vectors_bytes(D));
                bounds.lost[i - first] = of_row.lost[r], bounds.all[i - first] = of_row.all[r];
                work.late_row[i] = int32_t(row);
                work.late_rest[i] = block.rest[row];
                work.late_threshold[i] = i < count ? block.threshold[row] : __builtin_nanf("");
            }
            const auto* lo = reinterpret_cast<const uint16_t*>(to + steps * kBytes);
            TilePlacing<Set>::bound_precisely(lo, steps, kBytes / 2, D, bounds);
            for (int64_t step = steps; step < 2 * steps; step++)
                Set::transpose(to + step * kBytes, to + step * kBytes);
        }
        return {work.late,     padded / kTile, work.late_threshold, work.late_rest,
                work.late_row, work.noted,     work.late_least};
    }

    static void screen_late(Work& work, const Block& block, const Part& part, int64_t count, const OpenCodes& open) {
        for (int64_t i = 0; i < count; i += kLateRows) {
            const int64_t some = count - i < kLateRows ? count - i : kLateRows;
            const Block late = gather(work, block, work.late_of_all + i, some, part.D);
            forget(work, late);
            Pass::template pass<kThree>(work, late, part);
            mark_open<kThree>(work, late, part);
            for (int64_t r = 0; r < some; r++) open.threshold[late.row[r]] = late.threshold[r];
            look_again<kThree>(work, late, part, open);
        }
    }

    // Of 32 values, none of them negative.
    VQOPS_INLINE float largest_of(const float* values) {
        const Vector a = Set::load(values), b = Set::load(values + kTile);
        alignas(64) float each[kTile];
        Set::store(each, a < b ? b : a);
        for (int64_t n = kTile / 2; n > 0; n /= 2)
            for (int64_t i = 0; i < n; i++) each[i] = each[i] < each[i + n] ? each[i + n] : each[i];
        return each[0];
    }

    template <Tier tier>
    static void screen_part(Work& work, const Block& block, const Part& part, const OpenCodes& open) {
        for (int64_t p = 0; p < part.count; p++) {
            work.slack[p] = largest_of(part.slack + p * kPair);
            work.codes[p] = *reinterpret_cast<const CodeBounds*>(part.panel + p * panel_bytes(part.D) +
                                                                 2 * vectors_bytes(part.D));
        }
        Pass::template pass<tier>(work, block, part);
        mark_open<tier>(work, block, part);
        const int64_t late = tier == kOne ? take_late(work, block, part, open) : 0;
        look_again<tier>(work, block, part, open);
        if (late > 0) screen_late(work, block, part, late, open);
    }

    static void screen(const void* groups, int64_t rows, const Panels& panels, const OpenCodes& open) {
        const int64_t D = panels.D;
        if (rows == 0) return;
        Work& work = work_of(open, rows, D);
        const Block block = {static_cast<const char*>(groups), rows / kTile, open.threshold, open.rest, work.row,
                             work.noted,                       work.least};
        forget(work, block);
        Set::configure();
        for (int64_t p = 0; p < panels.count; p += kChunk) {
            const Part part = {static_cast<const char*>(panels.words) + p * panel_bytes(D), panels.start + p * kPair,
                               panels.slack + p * kPair, p, panels.count - p < kChunk ? panels.count - p : kChunk, D};
            if (folds(D)) screen_part<kFolded>(work, block, part, open);
            else screen_part<kOne>(work, block, part, open);
        }
        Set::release();
    }

    // The bounds of a panel are those of its largest radius, so like lies with like, unless they are close anyway.
    static bool by_radius(int64_t D) { return !folds(D); }

    // The pass without its loads and what follows the products.
    static float spin(int64_t steps, float value) {
        alignas(64) float memory[kSums] = {value};
        Set::configure();
        Set::template zero<0>(), Set::template zero<1>(), Set::template zero<2>(), Set::template zero<3>();
        Set::template load<4>(memory), Set::template load<5>(memory);
        Set::template load<6>(memory), Set::template load<7>(memory);
        for (int64_t i = 0; i < steps; i++) {
            Set::template multiply<0, 4, 6>();
            Set::template multiply<1, 4, 7>();
            Set::template multiply<2, 5, 6>();
            Set::template multiply<3, 5, 7>();
        }
        Set::template store<0>(memory);
        Set::release();
        return memory[0];
    }

    // The rest of the set is `others`, of the same processor; `floats` takes what is left to a set that takes float.
    static constexpr Instructions table(Instructions others, const Instructions* floats) {
        Instructions set = others;
        set.name = Set::kName;
        set.tile = set.codes = kPair;
        set.most_rows = 384, set.block_bytes = 512 * 1024;
        set.worth = Set::kWorth;
        set.direct = 0;
        set.by_radius = by_radius;
        set.layout = Set::kLayout;
        set.row_bytes = row_bytes, set.code_bytes = code_bytes;
        set.start_roundings = start_roundings;
        set.place_rows = TilePlacing<Set>::place_rows, set.place_codes = TilePlacing<Set>::place_codes;
        set.screen_bytes = screen_bytes, set.screen = screen;
        set.drawing = set.precise = floats;
        set.too_often = 0.5;  // the pass before is a small part of what float takes
        set.spin = spin;
        set.spin_products = int(4 * kSums * kStep);
        return set;
    }
};
