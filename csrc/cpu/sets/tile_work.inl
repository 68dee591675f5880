// What the screening pass in tiles (tiles.inl) works with, and the memory of it that a thread has.

struct TileWork : TileShape {
    static constexpr int64_t kChunk = 256;     // pairs of tiles of codes at a time; bounds what is noted
    static constexpr int64_t kLateRows = 128;  // of the second tier at a time
    static constexpr int64_t kLateGroups = kLateRows / kTile;

    // Products: hi.hi, three, or three and the start in one step.
    enum Tier { kOne, kThree, kFolded };

    // Of 16 rows: the pairs of tiles that may be open, with their least sums.
    struct Noted {
        int64_t count;
        alignas(64) int32_t open[kTile];  // tiles of each row, once all are noted,
        uint16_t rows[kChunk][2];         // and the rows of each tile that have it open
        int32_t pair[kChunk];
        alignas(64) float least[kChunk][2][kTile];
    };

    // Rows of a tier, and what is known of them. The threshold of a row that is none is NaN, which nothing is below.
    struct Block {
        const char* groups;
        int64_t count;       // of groups, even
        float* threshold;    // [rows]
        const float* rest;   // [rows]
        const int32_t* row;  // [rows] their numbers in the block of the first tier
        Noted* noted;        // of each group
        float* least;        // [groups, wanted, 16] upper bounds, if several codes are wanted
    };

    // A range of the panels.
    struct Part {
        const char* panel;
        const float *start, *slack;
        int64_t first, count, D;
    };

    // What a thread works in; behind it lie the rows of the second tier, what is noted of groups, their least bounds and
    // the numbers of rows.
    struct Work {
        alignas(64) float sums[4 * kSums];
        alignas(64) float start[2][2 * kSums];  // of two tiles of codes, a line each; two, since stores are late
        float slack[kChunk];                    // the largest of each panel,
        CodeBounds codes[kChunk];               // and its coefficients, side by side
        float late_threshold[kLateRows], late_rest[kLateRows];
        int32_t late_row[kLateRows];
        int64_t wanted;
        char* late;
        Noted* noted;
        float *least, *late_least;
        int32_t *row, *late_of_all;  // [rows] 0, 1, ...; those of the second tier
    };

    VQOPS_INLINE int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    VQOPS_INLINE int64_t noted_bytes(int64_t groups) {
        return (groups > kLateGroups ? groups : kLateGroups) * int64_t(sizeof(Noted));
    }
    VQOPS_INLINE int64_t least_bytes(int64_t groups, int64_t wanted) {
        return wanted > 1 ? groups * wanted * kTile * int64_t(sizeof(float)) : 0;
    }

    static int64_t screen_bytes(int64_t rows, int64_t D, int64_t wanted) {
        return int64_t(sizeof(Work)) + kLateGroups * group_bytes(D) + noted_bytes(rows / kTile) +
               least_bytes(rows / kTile, wanted) + least_bytes(kLateGroups, wanted) + 2 * whole_lines(4 * rows);
    }

    VQOPS_INLINE Work& work_of(const OpenCodes& open, int64_t rows, int64_t D) {
        Work& work = *static_cast<Work*>(open.work);
        char* at = static_cast<char*>(open.work) + sizeof(Work);
        const auto take = [&](int64_t bytes) { return at += bytes, at - bytes; };
        work.wanted = open.wanted;
        work.late = take(kLateGroups * group_bytes(D));
        work.noted = reinterpret_cast<Noted*>(take(noted_bytes(rows / kTile)));
        work.least = reinterpret_cast<float*>(take(least_bytes(rows / kTile, open.wanted)));
        work.late_least = reinterpret_cast<float*>(take(least_bytes(kLateGroups, open.wanted)));
        work.row = reinterpret_cast<int32_t*>(take(whole_lines(4 * rows)));
        work.late_of_all = reinterpret_cast<int32_t*>(at);
        for (int64_t r = 0; r < rows; r++) work.row[r] = int32_t(r);
        return work;
    }

    VQOPS_INLINE void forget(const Work& work, const Block& block) {
        if (work.wanted == 1) return;
        for (int64_t i = 0; i < block.count * work.wanted * kTile; i++) block.least[i] = __builtin_inff();
    }
};
