// How rows and codes lie in memory for the screening pass in tiles (tiles.inl), and what places them there. Of 16 vectors
// first the steps of hi, then those of lo; of a panel's 32 codes hi of both tiles, then lo of both. Behind them stand the
// coefficients of the bounds. Up to kFoldedD dimensions hi and lo share a step.

struct TileShape {
    static constexpr int64_t kTile = 16;                  // codes, rows
    static constexpr int64_t kPair = 2 * kTile;           // that pass together
    static constexpr int64_t kStep = 32;                  // dimensions
    static constexpr int64_t kBytes = kTile * kStep * 2;  // of a step of a tile
    static constexpr int64_t kSums = kTile * kTile;       // of a product
    static constexpr int64_t kFoldedD = (kStep - 3) / 3;
    static constexpr float kAbsentStart = 0x1p120f;  // finite, so that no product is NaN

    VQOPS_INLINE bool folds(int64_t D) { return D <= kFoldedD; }
    VQOPS_INLINE int64_t steps_of(int64_t D) { return folds(D) ? 1 : (D + kStep - 1) / kStep; }
    VQOPS_INLINE int64_t vectors_bytes(int64_t D) { return steps_of(D) * kBytes * (folds(D) ? 1 : 2); }  // of 16

    struct RowBounds {  // of 16 rows
        float radius[kTile], lost[kTile];
        union {
            float all[kTile];  // with one product: norms
            float low[kTile];  // with three
        };
    };
    struct CodeBounds {  // the largest of 32 codes
        float radius, lost, lost3, low;
    };
    static constexpr int64_t kLine = 64;  // of a cache, for these

    VQOPS_INLINE int64_t group_bytes(int64_t D) { return vectors_bytes(D) + int64_t(sizeof(RowBounds)); }
    VQOPS_INLINE int64_t panel_bytes(int64_t D) { return 2 * vectors_bytes(D) + kLine; }
    static int64_t row_bytes(int64_t D) { return group_bytes(D) / kTile; }
    static int64_t code_bytes(int64_t D) { return panel_bytes(D) / kPair; }

    // Roundings that a product passes: 16 in a step, the two halves of a step, one a step, and those of the epilogue.
    VQOPS_INLINE int64_t roundings(int64_t products, int64_t D) { return 17 + products * steps_of(D) + 6; }
    static int64_t start_roundings(int64_t D) { return 3 * steps_of(D) + 8; }

    VQOPS_INLINE float start_of(float start) { return start < kAbsentStart ? start : kAbsentStart; }
};

template <class Set>
struct TilePlacing : TileShape {
    typedef typename Set::Vector Vector;
    typedef uint16_t HalfWord __attribute__((may_alias));

    // Sums over 16 vectors: squares of the whole and of what hi leaves; of codes also of what hi and lo leave, and of lo.
    struct RowSquares {
        Vector all[kTile], lost[kTile];
    };
    struct CodeSquares : RowSquares {
        Vector left[kTile], low[kTile];
    };

    // Dimensions [d, d + 32) of from - minus, scaled, as hi and lo.
    template <class Squares>
    VQOPS_INLINE void split(const float* from, const float* minus, float scale, int64_t D, int64_t d, HalfWord* hi,
                            HalfWord* lo, int64_t i, Squares& squares) {
        alignas(64) float value[kStep];
        const int64_t some = D - d < kStep ? D - d : kStep;
        if (some < kStep) {
            for (int64_t j = 0; j < kStep; j++) value[j] = 0;
            for (int64_t j = 0; j < some; j++) value[j] = (from[d + j] - minus[d + j]) * scale;
        }
        VQOPS_UNROLL_ALL
        for (int v = 0; v < 2; v++) {
            const int64_t at = d + v * kTile;
            const Vector whole = some < kStep ? Set::load(value + v * kTile)
                                              : (Set::load(from + at) - Set::load(minus + at)) * Set::broadcast(scale);
            const Vector lost = whole - Set::halves(whole, hi + v * kTile);
            const Vector low = Set::halves(lost, lo + v * kTile);
            squares.all[i] += whole * whole;
            squares.lost[i] += lost * lost;
            if constexpr (requires { squares.low; }) {
                squares.left[i] += (lost - low) * (lost - low);
                squares.low[i] += low * low;
            }
        }
    }

    VQOPS_INLINE Vector sum_each(const Vector* squares) {
        alignas(64) float turned[kSums];
        Set::transpose(squares, turned);
        Vector sum = {};
        for (int64_t i = 0; i < kTile; i++) sum += Set::load(turned + i * kTile);
        return sum;
    }

    // At least the norms of 16 vectors, of sums of squares in float; as norm_of (words.inl).
    VQOPS_INLINE Vector norms_of(Vector sums, int64_t D) {
        return Set::square_root(sums) * Set::broadcast(1 + 1e-5f + float(D) * 0x1p-23f) +
               Set::broadcast(float(D) * 0x1p-70f);
    }

    // Where the three bfloat16 of a folded vector lie: hi of a row is met by hi and lo of a code, lo by hi.
    VQOPS_INLINE void fold(HalfWord* line, const HalfWord* first, const HalfWord* second, const HalfWord* third,
                           int64_t D) {
        for (int64_t d = 0; d < D; d++) line[d] = first[d], line[D + d] = second[d], line[2 * D + d] = third[d];
    }

    // 16 rows of a block, negated, since tiles only add. Only hi is turned: few rows need lo.
    static __attribute__((noinline)) void place_group(const Given& rows, int64_t first, int64_t count, char* group,
                                                      RowNorm* norms) {
        const int64_t D = rows.D, steps = steps_of(D);
        RowSquares squares{};
        alignas(64) HalfWord hi[kTile * kStep], small[kTile * kStep];
        for (int64_t i = 0; i < kTile * kStep; i++) hi[i] = small[i] = 0;
        for (int64_t step = 0; step < steps; step++) {
            HalfWord* const lo = folds(D) ? small : reinterpret_cast<HalfWord*>(group + (steps + step) * kBytes);
            for (int64_t r = 0; r < count; r++)
                split(rows.centre, rows.vectors[first + r], rows.scale, D, step * kStep, hi + r * kStep, lo + r * kStep,
                      r, squares);
            for (int64_t r = 0; folds(D) && r < count; r++) {
                alignas(64) HalfWord line[kStep] = {};
                fold(line, hi + r * kStep, hi + r * kStep, lo + r * kStep, D);
                for (int64_t i = 0; i < 3; i++) line[3 * D + i] = 0x3f80;  // 1, for the start of the sums
                __builtin_memcpy(hi + r * kStep, line, sizeof(line));
            }
            Set::transpose(hi, group + step * kBytes);
        }
        const Vector square = sum_each(squares.all), all = norms_of(square, D);
        const Vector lost = norms_of(sum_each(squares.lost), D) + all * Set::broadcast(float(1.02 * kUnit));
        const Vector held = Set::broadcast(float(kRoom)) * (all + lost);  // with room, at least the norm of hi
        const Vector one = Set::broadcast(float(double(roundings(1, D)) * kUnit));
        RowBounds& bounds = *reinterpret_cast<RowBounds*>(group + vectors_bytes(D));
        Set::store(bounds.radius, Set::broadcast(float(kRoom)) * lost + one * held);
        Set::store(bounds.lost, held);
        Set::store(bounds.all, all);
        if (folds(D)) bound_precisely(small, 1, kTile * kStep, D, bounds);
        for (int64_t r = 0; r < count; r++) norms[r] = {square[r], double(all[r]) * (1 + 0x1p-20)};
    }

    // The bounds of 16 rows for three products, of those for one and of `lo`, `steps` times 16 lines of 32. What lo leaves
    // is at most 2^-8 of lo.
    VQOPS_INLINE void bound_precisely(const HalfWord* lo, int64_t steps, int64_t to_next_step, int64_t D,
                                      RowBounds& bounds) {
        Vector squares[kTile] = {};
        for (int64_t step = 0; step < steps; step++)
            for (int64_t i = 0; i < 2 * kTile; i++) {
                const Vector low = Set::widened(lo + step * to_next_step + i * kTile);
                squares[i / 2] += low * low;
            }
        const Vector room = Set::broadcast(float(kRoom)), low = norms_of(sum_each(squares), D);
        const Vector left = low * Set::broadcast(0x1p-8f) + Set::load(bounds.all) * Set::broadcast(float(1.02 * kUnit));
        const Vector both = Set::load(bounds.lost) + room * low;  // with room, at least the norms of hi and lo
        const Vector three = Set::broadcast(float(double(roundings(3, D)) * kUnit)) * both;
        Set::store(bounds.radius, room * left + three);
        Set::store(bounds.lost, both);
        Set::store(bounds.low, room * low + three + three);
    }

    static void place_rows(const Given& rows, int64_t first, void* block, RowNorm* norms) {
        for (int64_t r = 0; r < rows.count; r += kTile) {
            char* const group = static_cast<char*>(block) + (first + r) / kTile * group_bytes(rows.D);
            place_group(rows, r, rows.count - r < kTile ? rows.count - r : kTile, group, norms + r);
        }
    }

    // Two tiles of codes: hi of both, lo of both.
    static void place_codes(const Given& codes, const double* radius, const float* start, void*, void* panel) {
        const int64_t D = codes.D, steps = steps_of(D);
        char* const to = static_cast<char*>(panel);
        const bool whole = codes.count == kPair && !folds(D);  // all of its vectors are written
        for (int64_t i = whole ? 2 * vectors_bytes(D) : 0; i < panel_bytes(D); i++) to[i] = 0;
        CodeBounds& bounds = *reinterpret_cast<CodeBounds*>(to + 2 * vectors_bytes(D));
        for (int64_t tile = 0; tile < 2; tile++) {
            CodeSquares squares{};
            char* const hi = to + tile * steps * kBytes;
            const int64_t first = tile * kTile, count = codes.count - first < kTile ? codes.count - first : kTile;
            for (int64_t j = 0; j < count; j++) place_code(codes, first + j, hi + j * kStep * 2, j, squares);
            for (int64_t j = 0; folds(D) && j < kTile; j++)
                fold_start(j < count ? start[first + j] : __builtin_inff(),
                           reinterpret_cast<HalfWord*>(hi + j * kStep * 2) + 3 * D);
            const Vector lost = norms_of(sum_each(squares.lost), D), left = norms_of(sum_each(squares.left), D);
            const Vector low = norms_of(sum_each(squares.low), D);
            for (int64_t j = 0; j < count; j++) {
                const double formed = 1.01 * kUnit * radius[first + j];
                raise(bounds.radius, radius[first + j]);
                raise(bounds.lost, double(lost[j]) + formed);
                raise(bounds.lost3, double(left[j]) + formed);
                raise(bounds.low, double(low[j]));
            }
        }
    }

    VQOPS_INLINE void place_code(const Given& codes, int64_t k, char* hi, int64_t j, CodeSquares& squares) {
        const int64_t D = codes.D, steps = steps_of(D);
        if (folds(D)) {
            HalfWord high[kStep], low[kStep];
            split(codes.vectors[k], codes.centre, codes.scale, D, 0, high, low, j, squares);
            return fold(reinterpret_cast<HalfWord*>(hi), high, low, high, D);
        }
        char* const lo = hi + 2 * steps * kBytes;
        for (int64_t step = 0; step < steps; step++)
            split(codes.vectors[k], codes.centre, codes.scale, D, step * kStep,
                  reinterpret_cast<HalfWord*>(hi + step * kBytes), reinterpret_cast<HalfWord*>(lo + step * kBytes), j,
                  squares);
    }

    VQOPS_INLINE void fold_start(float start, HalfWord* to) {
        float rest = start_of(start);
        for (int i = 0; i < 3; i++) {
            HalfWord halves[kTile];
            rest -= Set::halves(Set::broadcast(rest), halves)[0];
            to[i] = halves[0];
        }
    }

    VQOPS_INLINE void raise(float& largest, double value) {
        const float up = float(value * kUpward);
        if (up > largest) largest = up;
    }
};
