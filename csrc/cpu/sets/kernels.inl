// The kernels of one instruction set. Its file includes this behind its compiler target, in an anonymous namespace, so
// that nothing is linked into code for another. A set says
//   kName, kTile, kCodes   rows of x, and codes, per register tile; as many codes are a panel of the packed codebook
//   kLayout                the id of its panels' layout
//   kDirect                Instructions.direct
//   kWidth, Vector, ...    vectors of floats: floats4.inl, floats16.inl, avx2.cpp
//   Word, Words, ...       the words of the screening pass: FloatWords or PairWords
// Nothing but <cstdint> and intrinsics may be used here: target.h.

#include "../exact.h"

// Loops over a tile must unroll completely, or the sums do not stay in registers.
#define VQOPS_UNROLL_ALL _Pragma("GCC unroll 16")

#include "words.inl"
#include "draws.inl"
#include "ema.inl"
#include "hash.inl"

template <class Set>
struct Kernels {
    typedef typename Set::Vector Vector;
    typedef typename Set::UnalignedVector UnalignedVector;
    typedef typename Set::LaneMask LaneMask;
    typedef typename Set::Word Word;
    typedef typename Set::Words Words;
    static constexpr int kWidth = Set::kWidth, kTile = Set::kTile, kCodes = Set::kCodes, kVectors = kCodes / kWidth;

    // Words of a row or a code: its dimensions, and the coefficients of its bound behind them, which the screening pass
    // takes as one more.
    VQOPS_INLINE int64_t depth_of(int64_t D) { return (D + Set::kPerWord - 1) / Set::kPerWord + 1; }
    VQOPS_INLINE int64_t stride_of(int64_t D) { return (depth_of(D) + 15) / 16 * 16; }  // rows in whole cache lines
    static int64_t row_bytes(int64_t D) { return stride_of(D) * int64_t(sizeof(Word)); }
    static int64_t code_bytes(int64_t D) { return depth_of(D) * int64_t(sizeof(Word)); }
    static int64_t start_roundings(int64_t D) { return D + 6; }

    // The code that is nearest to a row is likely to be near the centre: with those first, fewer become candidates on
    // the way. Not in few dimensions, where the nearest code lies at the row's own radius.
    static bool by_radius(int64_t D) { return D >= 32; }

    static int64_t screen_bytes(int64_t, int64_t, int64_t) { return 0; }

    static void place_rows(const Given& rows, int64_t first, void* block, RowNorm* norms) {
        const int64_t D = rows.D, stride = stride_of(D);
        Word* to = static_cast<Word*>(block) + first * stride;
        for (int64_t r = 0; r < rows.count; r++, to += stride) {
            const Squares squares = Set::place(rows.vectors[r], rows.centre, rows.scale, D, to);
            norms[r] = {squares.all, norm_of(squares.all, D)};
            Set::bound_row(squares, norms[r].at_least, D, to);
        }
    }

    // The codes of a panel, placed as rows are, then turned: [depth, kCodes].
    static void place_codes(const Given& codes, const double* radius, const float*, void* work, void* panel) {
        const int64_t D = codes.D, depth = depth_of(D);
        Word *const rows = static_cast<Word*>(work), *to = static_cast<Word*>(panel);
        for (int64_t i = 0; i < kCodes * depth; i++) rows[i] = 0;
        for (int64_t j = 0; j < codes.count; j++) {
            Word* const row = rows + j * depth;
            Set::bound_code(Set::place(codes.vectors[j], codes.centre, codes.scale, D, row), radius[j], D, row);
        }
        for (int64_t d = 0; d < depth; d++)
            for (int64_t j = 0; j < kCodes; j++) *to++ = rows[j * depth + d];
    }

    // A bit for each value of a row that does not exceed a limit.
    VQOPS_INLINE unsigned not_above(const Vector* value, float limit) {
        unsigned lanes = 0;
        VQOPS_UNROLL_ALL
        for (int v = 0; v < kVectors; v++)
            lanes |= unsigned(Set::bits(Set::less_equal(value[v], Set::broadcast(limit)))) << (v * kWidth);
        return lanes;
    }

    VQOPS_INLINE float least_of(const Vector* v) {
        Vector least = v[0];
        VQOPS_UNROLL_ALL
        for (int i = 1; i < kVectors; i++) least = v[i] < least ? v[i] : least;
        if constexpr (kWidth == 16) {
            return Set::least(least);
        } else {
            float value = least[0];
            for (int i = 1; i < kWidth; i++) value = least[i] < value ? least[i] : value;
            return value;
        }
    }

    // Codes of a panel whose bounds do not exceed the threshold of `row` go to its list. `last`: the row's last word.
    static void open_row(const Vector* bound, unsigned lanes, Word last, const Word* panel, const float* slack,
                         int64_t depth, int64_t code, int64_t row, const OpenCodes& open) {
        if (code + kCodes > open.codes) lanes &= (uint64_t(1) << (open.codes - code)) - 1;
        Vector upper[kVectors];
        VQOPS_UNROLL_ALL
        for (int v = 0; v < kVectors; v++) {
            const Vector size = bound[v] < -bound[v] ? -bound[v] : bound[v];
            const Vector charged = Set::spread_of(last, Set::load_words(panel + (depth - 1) * kCodes + v * kWidth)) +
                                   Set::load(slack + v * kWidth) + Set::broadcast(open.rest[row]);
            // The factors cover the rounding of these sums (docs/exactness.md).
            upper[v] = bound[v] + (size * Set::broadcast(0x1p-21f) + charged * Set::broadcast(1 + 0x1p-20f));
        }
        const float* lower = reinterpret_cast<const float*>(bound);
        if (open.candidate) {
            for (; lanes; lanes &= lanes - 1) {
                const int j = __builtin_ctz(lanes);
                if (lower[j] <= open.threshold[row])
                    open.candidate(open.owner, row, code + j, lower[j], reinterpret_cast<const float*>(upper)[j]);
            }
            return;
        }
        const float least = least_of(upper), limit = least < open.threshold[row] ? least : open.threshold[row];
        open.threshold[row] = limit;
        lanes &= not_above(bound, limit);
        int32_t count = open.count[row];
        int32_t* codes = open.code + row * open.room;
        float* lowers = open.lower + row * open.room;
        for (; lanes; lanes &= lanes - 1) {
            const int j = __builtin_ctz(lanes);
            codes[count] = int32_t(code + j);
            lowers[count++] = lower[j];
        }
        open.count[row] = count;
        if (count >= open.capacity) open.full(open.owner, row);
    }

    // The rows of a tile with a bound that does not exceed their threshold.
    static __attribute__((noinline)) void open_tile(const Vector (*bound)[kVectors], const Word* x, int64_t stride,
                                                    const Word* panel, const float* slack, int64_t depth, int64_t code,
                                                    int64_t row, const OpenCodes& open) {
        unsigned rows = 0, lanes[kTile];
        for (int r = 0; r < kTile; r++) {
            lanes[r] = not_above(bound[r], open.threshold[row + r]);
            rows |= unsigned(lanes[r] != 0) << r;
        }
        for (; rows; rows &= rows - 1) {
            const int r = __builtin_ctz(rows);
            open_row(bound[r], lanes[r], x[r * stride + depth - 1], panel, slack, depth, code, row + r, open);
        }
    }

    // Lower bounds of kTile rows against kCodes codes: start - x.c, all sums in registers.
    VQOPS_INLINE void lower_bounds(const Word* x, int64_t stride, const Word* panel, const float* start, int64_t depth,
                                   Vector (&sum)[kTile][kVectors]) {
        VQOPS_UNROLL_ALL
        for (int v = 0; v < kVectors; v++) {
            const Vector first = Set::load(start + v * kWidth);
            VQOPS_UNROLL_ALL
            for (int r = 0; r < kTile; r++) sum[r][v] = first;
        }
        for (int64_t d = 0; d < depth; d++) {
            Words c[kVectors];
            VQOPS_UNROLL_ALL
            for (int v = 0; v < kVectors; v++) c[v] = Set::load_words(panel + d * kCodes + v * kWidth);
            VQOPS_UNROLL_ALL
            for (int r = 0; r < kTile; r++) {
                const Words value = Set::broadcast_word(x[r * stride + d]);
                VQOPS_UNROLL_ALL
                for (int v = 0; v < kVectors; v++) sum[r][v] = Set::step(sum[r][v], value, c[v]);
            }
        }
    }

    // Where a bound does not exceed its row's threshold the code is a candidate, which is rare after the first panels.
    static void screen_tile(const Word* x, int64_t stride, const Word* panel, const float* start, const float* slack,
                            int64_t depth, int64_t code, int64_t row, const OpenCodes& open) {
        Vector sum[kTile][kVectors];
        lower_bounds(x, stride, panel, start, depth, sum);
        LaneMask below = {};
        VQOPS_UNROLL_ALL
        for (int r = 0; r < kTile; r++) {
            const Vector limit = Set::broadcast(open.threshold[row + r]);
            Vector least = sum[r][0];
            VQOPS_UNROLL_ALL
            for (int v = 1; v < kVectors; v++) least = sum[r][v] < least ? sum[r][v] : least;
            below |= Set::less_equal(least, limit);
        }
        if (!Set::any(below)) return;
        Vector bound[kTile][kVectors];
        VQOPS_UNROLL_ALL
        for (int r = 0; r < kTile; r++) {
            VQOPS_UNROLL_ALL
            for (int v = 0; v < kVectors; v++) bound[r][v] = sum[r][v];
        }
        open_tile(bound, x, stride, panel, slack, depth, code, row, open);
    }

    // A panel stays in the first cache while all rows pass it.
    static void screen(const void* block, int64_t rows, const Panels& panels, const OpenCodes& open) {
        const int64_t depth = depth_of(panels.D), stride = stride_of(panels.D);
        const Word *row = static_cast<const Word*>(block), *panel = static_cast<const Word*>(panels.words);
        for (int64_t p = 0; p < panels.count; p++, panel += depth * kCodes) {
            const int64_t code = p * kCodes;
            for (int64_t r = 0; r < rows; r += kTile)
                screen_tile(row + r * stride, stride, panel, panels.start + code, panels.slack + code, depth, code, r,
                            open);
        }
    }

    // The screening pass without its loads: `steps` times a tile of independent multiply-adds.
    static float spin(int64_t steps, float value) {
        Vector sum[kTile][kVectors];
        VQOPS_UNROLL_ALL
        for (int r = 0; r < kTile; r++) {
            VQOPS_UNROLL_ALL
            for (int v = 0; v < kVectors; v++) sum[r][v] = Set::broadcast(value * float(r * kVectors + v));
        }
        const Words factor = (Words)Set::broadcast(value);
        for (int64_t i = 0; i < steps; i++) {
            VQOPS_UNROLL_ALL
            for (int r = 0; r < kTile; r++) {
                VQOPS_UNROLL_ALL
                for (int v = 0; v < kVectors; v++) sum[r][v] = Set::step(sum[r][v], factor, factor);
            }
        }
        float total = 0;
        for (int r = 0; r < kTile; r++)
            for (int v = 0; v < kVectors; v++) total += sum[r][v][0];
        return total;
    }

    static double exact_cost(const double* x, const double* c, int64_t padded, bool cosine) {
        return cost_of(x, c, padded, cosine);
    }

    static double take_off(float* rest, float* total, const float* code, int64_t D) {
        return take_off_code(rest, total, code, D);
    }

    static double exact_distance(const float* x, const float* c, int64_t D) {
        return squared_distance_of_floats(x, c, D);
    }

    static double exact_dot(const double* x, const double* c, int64_t padded) { return dot(x, c, padded); }

    static CodeFacts measure(const double* code, const double* weights, const double* centre, double scale,
                             int64_t padded) {
        Lanes key = {}, square = {};
        for (int64_t i = 0; i < padded; i += 8) {
            const Lanes c = *reinterpret_cast<const Lanes*>(code + i);
            const Lanes e = (c - *reinterpret_cast<const Lanes*>(centre + i)) * scale;
            key += *reinterpret_cast<const Lanes*>(weights + i) * c;
            square += e * e;
        }
        return {add_lanes(key), add_lanes(square)};
    }

    static void add_error(const float* x, const float* q, const float* g, float error, int64_t D, float* out) {
        const auto eight = [](const float* p) -> const FloatLanes& { return *reinterpret_cast<const FloatLanes*>(p); };
        int64_t i = 0;
        for (; i + 8 <= D; i += 8)
            *reinterpret_cast<FloatLanes*>(out + i) = eight(g + i) + 2 * (eight(x + i) - eight(q + i)) * error;
        for (; i < D; i++) out[i] = g[i] + 2 * (x[i] - q[i]) * error;
    }

    template <bool in_runs>
    VQOPS_INLINE void add_rows_of(RowSums task) {  // a copy, which no sum can lie in
        const int64_t D = task.D;
        const int64_t ahead = 1024 / (D + 1) + 1;  // rows of which to ask for early: 4 KB, measured on a Zen 4
        for (int64_t n = 0; n < task.N; n++) {
            const uint64_t k = uint64_t(task.indices[n * task.index_stride] - task.first);
            if (k >= uint64_t(task.count)) continue;
            const float* row = task.rows + n * task.row_stride;
            float* sum = in_runs ? task.target[k] : task.sums + k * D;
            const float* next = n + ahead < task.N ? row + ahead * task.row_stride : row;
            for (int64_t i = 0; i < D; i += 16) __builtin_prefetch(next + i);
            int64_t i = 0;
            for (; i + kWidth <= D; i += kWidth)
                *reinterpret_cast<UnalignedVector*>(sum + i) = Set::load(sum + i) + Set::load(row + i);
            if (kWidth > 8 && i + 8 <= D) {
                *reinterpret_cast<FloatLanes*>(sum + i) += *reinterpret_cast<const FloatLanes*>(row + i);
                i += 8;
            }
            for (; i < D; i++) sum[i] += row[i];
            if (in_runs && ++task.length[k] == 0) task.fold(task.owner, int64_t(k));
        }
    }

    static void add_rows(const RowSums& task) {
        if (task.target) add_rows_of<true>(task);
        else add_rows_of<false>(task);
    }

    static constexpr Instructions table(UnpreparedKernel unprepared, int group, RotationKernel turn_back,
                                        const Instructions* precise = nullptr) {
        return {
            .name = Set::kName,
            .tile = kTile,
            .codes = kCodes,
            .lanes = kWidth,
            .most_rows = 98 / kTile * kTile,
            .block_bytes = 96 * 1024,
            .worth = Set::kWorth,
            .direct = Set::kDirect,
            .by_radius = by_radius,
            .layout = Set::kLayout,
            .row_bytes = row_bytes,
            .code_bytes = code_bytes,
            .start_roundings = start_roundings,
            .place_rows = place_rows,
            .place_codes = place_codes,
            .screen_bytes = screen_bytes,
            .screen = screen,
            .draw = Drawing<Set>::draw,
            .drawing = nullptr,
            .precise = precise,
            .too_often = 0.2,  // of 0.3 of the rows, the pass before makes it 1.2 to 1.3 times as long on a Zen 4
            .unprepared = unprepared,
            .group = group,
            .exact_cost = exact_cost,
            .exact_distance = exact_distance,
            .take_off = take_off,
            .turn_back = turn_back,
            .add_error = add_error,
            .dot = exact_dot,
            .measure = measure,
            .add_rows = add_rows,
            .move_averages = Averaging<Set>::move_averages,
            .move_codes = Averaging<Set>::move_codes,
            .absorb = Hashing<Set>::absorb,
            .spin = spin,
            .spin_products = kTile * kCodes * Set::kPerWord,
        };
    }
};

#include "unprepared.inl"
#include "rotation.inl"
