// The pass of all codes over a block of rows (tiles.inl): products, and what the least sums of two tiles of codes say.

template <class Set>
struct TilePass : TileWork {
    typedef typename Set::Vector Vector;

    // Coefficients of a panel's bounds, a lane for each row.
    struct Charge {
        Vector radius, lost, low;
    };
    template <Tier tier>
    VQOPS_INLINE Charge charge_of(const Work& work, int64_t p) {
        const CodeBounds& codes = work.codes[p];
        return {Set::broadcast(codes.radius), Set::broadcast(tier == kOne ? codes.lost : codes.lost3),
                Set::broadcast(codes.low)};
    }

    // What a sum of these rows and codes may err by.
    template <Tier tier>
    VQOPS_INLINE Vector width_of(const char* group, const Charge& codes, int64_t D) {
        const RowBounds& rows = *reinterpret_cast<const RowBounds*>(group + vectors_bytes(D));
        const Vector width = Set::load(rows.radius) * codes.radius + Set::load(rows.lost) * codes.lost;
        return tier == kOne ? width : width + Set::load(rows.low) * codes.low;
    }

    // The same of a group and a panel.
    template <Tier tier>
    VQOPS_INLINE Vector width_at(const Work& work, const Block& block, int64_t group, int64_t pair, int64_t D) {
        return width_of<tier>(block.groups + group * group_bytes(D), charge_of<tier>(work, pair), D);
    }

    VQOPS_INLINE Vector smaller(Vector a, Vector b) { return a < b ? a : b; }  // b if one is NaN

    VQOPS_INLINE Vector least_of(const float* sums) {
        Vector least[4];
        VQOPS_UNROLL_ALL
        for (int j = 0; j < 4; j++) least[j] = Set::load(sums + j * kTile);
        VQOPS_UNROLL_ALL
        for (int j = 4; j < kTile; j++) least[j % 4] = smaller(least[j % 4], Set::load(sums + j * kTile));
        return smaller(smaller(least[0], least[1]), smaller(least[2], least[3]));
    }

    // Takes bounds of 16 rows into their `wanted` least ones, which ascend.
    static __attribute__((noinline)) void take_bounds(float* least, int64_t wanted, const float* upper) {
        Vector moved = Set::load(upper);
        for (int64_t i = 0; i < wanted; i++) {
            const Vector held = Set::load(least + i * kTile);
            Set::store(least + i * kTile, smaller(moved, held));
            moved = moved < held ? held : moved;
        }
    }

    VQOPS_INLINE void lower_thresholds(Work& work, const Block& block, int64_t group, Vector upper) {
        float* const threshold = block.threshold + group * kTile;
        const Vector held = Set::load(threshold);
        if (work.wanted == 1) return Set::store(threshold, smaller(upper, held));
        if (!Set::not_above(upper, held)) return;
        float* const least = block.least + group * work.wanted * kTile;
        alignas(64) float bounds[kTile];
        Set::store(bounds, upper);
        take_bounds(least, work.wanted, bounds);
        Set::store(threshold, smaller(Set::load(least + (work.wanted - 1) * kTile), held));
    }

    // The sums of two tiles of codes and one of rows.
    template <Tier tier>
    VQOPS_INLINE void note(Work& work, const Block& block, int64_t group, const float* sums, const float* next_sums,
                           int64_t pair, const Charge& codes, int64_t D) {
        const Vector first = least_of(sums), second = least_of(next_sums), least = smaller(first, second);
        const Vector width = width_of<tier>(block.groups + group * group_bytes(D), codes, D);
        const Vector above = width + (Set::broadcast(work.slack[pair]) + Set::load(block.rest + group * kTile));
        if (work.wanted == 1) {
            lower_thresholds(work, block, group, least + above);
        } else {
            lower_thresholds(work, block, group, first + above);
            lower_thresholds(work, block, group, second + above);
        }
        Noted& noted = block.noted[group];
        Set::store(noted.least[noted.count][0], first);
        Set::store(noted.least[noted.count][1], second);
        noted.pair[noted.count] = int32_t(pair);
        noted.count += Set::not_above(least, Set::load(block.threshold + group * kTile) + width) != 0;
    }

    // Tiles 0 to 3 += codes 4, 5 times rows 6, 7.
    VQOPS_INLINE void multiply(const char* codes, int64_t to_next_codes, const char* rows, int64_t to_next_rows,
                               int64_t steps) {
        for (int64_t i = 0; i < steps; i++, codes += kBytes, rows += kBytes) {
            Set::template load<4>(codes);
            Set::template load<6>(rows);
            Set::template multiply<0, 4, 6>();
            Set::template load<7>(rows + to_next_rows);
            Set::template multiply<1, 4, 7>();
            Set::template load<5>(codes + to_next_codes);
            Set::template multiply<2, 5, 6>();
            Set::template multiply<3, 5, 7>();
        }
    }

    // The same for the first step. Each tile gives up the sums before when it is needed, so that stores and products
    // overlap.
    template <Tier tier>
    VQOPS_INLINE void multiply_first(Work& work, const char* codes, int64_t to_next_codes, const char* rows,
                                     int64_t to_next_rows, const float* start) {
        Set::template load<4>(codes);
        Set::template load<6>(rows);
        begin<tier, 0>(work.sums, start);
        Set::template multiply<0, 4, 6>();
        Set::template load<7>(rows + to_next_rows);
        begin<tier, 1>(work.sums + kSums, start);
        Set::template multiply<1, 4, 7>();
        Set::template load<5>(codes + to_next_codes);
        begin<tier, 2>(work.sums + 2 * kSums, start + kSums);
        Set::template multiply<2, 5, 6>();
        begin<tier, 3>(work.sums + 3 * kSums, start + kSums);
        Set::template multiply<3, 5, 7>();
    }

    // Stores a tile, and starts the next sums in it.
    template <Tier tier, int i>
    VQOPS_INLINE void begin(float* sums, const float* start) {
        Set::template store<i>(sums);
        if constexpr (tier == kFolded) Set::template zero<i>();
        else Set::template load<i>(start);
    }

    VQOPS_INLINE void spread_start(const float* start, int64_t codes, float* to) {
        for (int64_t j = 0; j < codes; j++) Set::store(to + j * kTile, Set::broadcast(start_of(start[j])));
    }

    // All panels of a part against all rows of a block. The sums of one step are stored when the next needs their
    // tiles, and noted while it multiplies.
    template <Tier tier>
    static void pass(Work& work, const Block& block, const Part& part) {
        const int64_t D = part.D, steps = steps_of(D), group_size = group_bytes(D);
        for (int64_t g = 0; g < block.count; g++) block.noted[g].count = 0;
        if (tier != kThree && steps == 1) return pass_held<tier, 1>(work, block, part);
        if (tier == kOne && steps == 2) return pass_held<tier, 2>(work, block, part);
        Charge before{};
        int64_t group = -1, pair = 0;
        for (int64_t p = 0; p < part.count; p++) {
            const Charge codes = charge_of<tier>(work, p);
            const char* panel = part.panel + p * panel_bytes(D);
            float* const start = work.start[p % 2];
            spread_start(part.start + p * kPair, kPair, start);
            for (int64_t g = 0; g < block.count; g += 2) {
                const char* rows = block.groups + g * group_size;
                multiply_first<tier>(work, panel, steps * kBytes, rows, group_size, start);
                multiply(panel + kBytes, steps * kBytes, rows + kBytes, group_size, steps - 1);
                if constexpr (tier == kThree) {
                    multiply(panel + 2 * steps * kBytes, steps * kBytes, rows, group_size, steps);
                    multiply(panel, steps * kBytes, rows + steps * kBytes, group_size, steps);
                }
                if (group >= 0) note_both<tier>(work, block, group, pair, before, D);
                group = g, pair = p, before = codes;
            }
        }
        Set::template store<0>(work.sums);
        Set::template store<1>(work.sums + kSums);
        Set::template store<2>(work.sums + 2 * kSums);
        Set::template store<3>(work.sums + 3 * kSums);
        note_both<tier>(work, block, group, pair, before, D);
    }

    template <Tier tier>
    VQOPS_INLINE void note_both(Work& work, const Block& block, int64_t group, int64_t pair, const Charge& codes,
                                int64_t D) {
        const float* const sums = work.sums;
        note<tier>(work, block, group, sums, sums + 2 * kSums, pair, codes, D);
        note<tier>(work, block, group + 1, sums + kSums, sums + 3 * kSums, pair, codes, D);
    }

    // The same where the codes of a panel stay in tiles, four of the eight: 32 codes against 16 rows at a time. Sums are
    // noted one group later still.
    template <Tier tier, int steps>
    static void pass_held(Work& work, const Block& block, const Part& part) {
        struct Sums {
            float* memory;
            int64_t group = -1, pair = 0;
        };
        const int64_t D = part.D, group_size = group_bytes(D);
        Charge codes[2];  // of this panel and the one before
        Sums last = {work.sums}, stored = {work.sums + 2 * kSums};  // in tiles; in memory
        const auto note_sums = [&](const Sums& sums) {
            note<tier>(work, block, sums.group, sums.memory, sums.memory + kSums, sums.pair, codes[sums.pair % 2], D);
        };
        for (int64_t p = 0; p < part.count; p++) {
            codes[p % 2] = charge_of<tier>(work, p);
            const char* panel = part.panel + p * panel_bytes(D);
            float* const start = work.start[p % 2];
            if (tier != kFolded) spread_start(part.start + p * kPair, kPair, start);
            Set::template load<4>(panel), Set::template load<5>(panel + steps * kBytes);
            if (steps == 2) Set::template load<6>(panel + kBytes), Set::template load<7>(panel + 3 * kBytes);
            for (int64_t g = 0; g < block.count; g++) {
                const char* rows = block.groups + g * group_size;
                Set::template load<2>(rows);
                begin<tier, 0>(last.memory, start);
                Set::template multiply<0, 4, 2>();
                begin<tier, 1>(last.memory + kSums, start + kSums);
                Set::template multiply<1, 5, 2>();
                if constexpr (steps == 2) {
                    Set::template load<3>(rows + kBytes);
                    Set::template multiply<0, 6, 3>();
                    Set::template multiply<1, 7, 3>();
                }
                if (stored.group >= 0) note_sums(stored);
                const Sums next = {stored.memory, g, p};
                stored = last, last = next;
            }
        }
        if (stored.group >= 0) note_sums(stored);
        Set::template store<0>(last.memory);
        Set::template store<1>(last.memory + kSums);
        note_sums(last);
    }
};
