// The kernels of one instruction set. instructions.cpp includes this file once for each, inside a namespace and a
// compiler target of its own, with
//   VQOPS_WIDTH     floats a vector
//   VQOPS_TILE      rows of x a register tile
//   VQOPS_BROADCAST(value)               a vector of one value
//   VQOPS_ANY(mask)                      whether a lane of a comparison is set
//   VQOPS_BITS(mask)                     a bit for each lane that is set
//   VQOPS_SUBTRACT_PRODUCT(sum, a, b)    sum - a * b, fused where the hardware does it
// Nothing but <cstdint> and intrinsics may be used here: an inline function of another header would be compiled for this
// target and could be linked into code that runs everywhere.

#include "../exact.h"

typedef float Vector __attribute__((vector_size(4 * VQOPS_WIDTH)));
typedef float UnalignedVector __attribute__((vector_size(4 * VQOPS_WIDTH), aligned(4)));
typedef int32_t Mask __attribute__((vector_size(4 * VQOPS_WIDTH)));

constexpr int kVectors = kPanel / VQOPS_WIDTH;

VQOPS_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }

// Loops over a tile must unroll completely, or the sums do not stay in registers.
#define VQOPS_UNROLL _Pragma("GCC unroll 16")

// Lower bounds of VQOPS_TILE rows against the kPanel codes of a panel: start - x.c, all sums in registers. Where a bound
// does not exceed its row's threshold the code is offered as a candidate, which is rare after the first panels.
static void screen_tile(const float* x, int64_t stride, const float* panel, int64_t depth, const float* start,
                        const float* threshold, int64_t code, int64_t row, const Offer& offer) {
    Vector sum[VQOPS_TILE][kVectors];
    VQOPS_UNROLL
    for (int v = 0; v < kVectors; v++) {
        const Vector first = load(start + v * VQOPS_WIDTH);
        VQOPS_UNROLL
        for (int r = 0; r < VQOPS_TILE; r++) sum[r][v] = first;
    }
    for (int64_t d = 0; d < depth; d++) {
        Vector c[kVectors];
        VQOPS_UNROLL
        for (int v = 0; v < kVectors; v++) c[v] = load(panel + d * kPanel + v * VQOPS_WIDTH);
        VQOPS_UNROLL
        for (int r = 0; r < VQOPS_TILE; r++) {
            const Vector value = VQOPS_BROADCAST(x[r * stride + d]);
            VQOPS_UNROLL
            for (int v = 0; v < kVectors; v++) sum[r][v] = VQOPS_SUBTRACT_PRODUCT(sum[r][v], value, c[v]);
        }
    }
    Mask below = {};
    VQOPS_UNROLL
    for (int r = 0; r < VQOPS_TILE; r++) {
        const Vector limit = VQOPS_BROADCAST(threshold[r]);
        Vector least = sum[r][0];
        VQOPS_UNROLL
        for (int v = 1; v < kVectors; v++) least = sum[r][v] < least ? sum[r][v] : least;
        below |= least <= limit;
    }
    if (!VQOPS_ANY(below)) return;
    VQOPS_UNROLL
    for (int r = 0; r < VQOPS_TILE; r++) {
        const Vector limit = VQOPS_BROADCAST(threshold[r]);
        unsigned lanes = 0;
        VQOPS_UNROLL
        for (int v = 0; v < kVectors; v++) lanes |= unsigned(VQOPS_BITS(sum[r][v] <= limit)) << (v * VQOPS_WIDTH);
        if (!lanes) continue;
        float bounds[kPanel];
        VQOPS_UNROLL
        for (int v = 0; v < kVectors; v++)
            *reinterpret_cast<UnalignedVector*>(bounds + v * VQOPS_WIDTH) = sum[r][v];
        // The least bound first: it lowers the threshold, which the others then rarely pass.
        int least = __builtin_ctz(lanes);
        for (unsigned rest = lanes & (lanes - 1); rest; rest &= rest - 1)
            if (bounds[__builtin_ctz(rest)] < bounds[least]) least = __builtin_ctz(rest);
        offer.candidate(offer.lists, row + r, code + least, bounds[least]);
        for (lanes &= ~(1u << least); lanes; lanes &= lanes - 1) {
            const int j = __builtin_ctz(lanes);
            if (bounds[j] <= threshold[r]) offer.candidate(offer.lists, row + r, code + j, bounds[j]);
        }
    }
}

// All codes against `rows` rows, a multiple of kTile. A panel stays in the first cache while all rows pass over it.
static void screen(const float* x, int64_t rows, int64_t stride, const float* panels, int64_t panel_count, int64_t depth,
                   const float* start, const float* threshold, const Offer& offer) {
    for (int64_t p = 0; p < panel_count; p++)
        for (int64_t r = 0; r < rows; r += VQOPS_TILE)
            screen_tile(x + r * stride, stride, panels + p * depth * kPanel, depth, start + p * kPanel, threshold + r,
                        p * kPanel, r, offer);
}

// Lane i of the result is the sum of the lanes of v[i].
VQOPS_INLINE Vector sum_each(const Vector* v) {
#if VQOPS_WIDTH == 8
    Vector half[2];
    VQOPS_UNROLL
    for (int i = 0; i < 2; i++) {
        const Vector *a = v + 4 * i, *b = a + 2;
        const Vector ab = VQOPS_SHUFFLE(a[0], a[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                          VQOPS_SHUFFLE(a[0], a[1], 1, 9, 3, 11, 5, 13, 7, 15);
        const Vector cd = VQOPS_SHUFFLE(b[0], b[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                          VQOPS_SHUFFLE(b[0], b[1], 1, 9, 3, 11, 5, 13, 7, 15);
        half[i] = VQOPS_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + VQOPS_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    return VQOPS_SHUFFLE(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           VQOPS_SHUFFLE(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    const Vector ab = VQOPS_SHUFFLE(v[0], v[1], 0, 4, 2, 6) + VQOPS_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
    const Vector cd = VQOPS_SHUFFLE(v[2], v[3], 0, 4, 2, 6) + VQOPS_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
    return VQOPS_SHUFFLE(ab, cd, 0, 1, 4, 5) + VQOPS_SHUFFLE(ab, cd, 2, 3, 6, 7);
#endif
}

// One code against rows in groups of VQOPS_WIDTH: |x - c|^2, for cosine -x.c / |c|. Values whose `factor`-fold does not
// exceed their row's threshold are offered. A code whose norm float32 can't hold is offered to all rows as NaN.
template <bool cosine>
static void direct_to(const float* x, int64_t rows, int64_t stride, const float* code, float factor,
                      const float* threshold, int64_t number, const Offer& offer) {
    float scale = -1;
    if (cosine) {
        Vector squares = {};
        for (int64_t d = 0; d < stride; d += VQOPS_WIDTH) squares += load(code + d) * load(code + d);
        float square = 0;
        for (int i = 0; i < VQOPS_WIDTH; i++) square += squares[i];
        if (!(square > 0x1p-100f && square < 0x1p100f)) {
            for (int64_t r = 0; r < rows; r++) offer.candidate(offer.lists, r, number, __builtin_nanf(""));
            return;
        }
        scale = 1 / __builtin_sqrtf(square);
    }
    for (int64_t r = 0; r < rows; r += VQOPS_WIDTH) {
        Vector sum[VQOPS_WIDTH] = {};
        for (int64_t d = 0; d < stride; d += VQOPS_WIDTH) {
            const Vector c = load(code + d);
            VQOPS_UNROLL
            for (int i = 0; i < VQOPS_WIDTH; i++) {
                const Vector value = load(x + (r + i) * stride + d), e = cosine ? value : value - c;
                sum[i] = VQOPS_SUBTRACT_PRODUCT(sum[i], e, (cosine ? c : e));
            }
        }
        const Vector value = sum_each(sum) * VQOPS_BROADCAST(scale);
        unsigned lanes = unsigned(VQOPS_BITS(value * VQOPS_BROADCAST(factor) <= load(threshold + r)));
        for (; lanes; lanes &= lanes - 1) {
            const int i = __builtin_ctz(lanes);
            offer.candidate(offer.lists, r + i, number, value[i]);
        }
    }
}

static void direct(const float* x, int64_t rows, int64_t stride, const float* code, bool cosine, float factor,
                   const float* threshold, int64_t number, const Offer& offer) {
    (cosine ? direct_to<true> : direct_to<false>)(x, rows, stride, code, factor, threshold, number, offer);
}

// (x - centre) * scale as float, and the sum of its squares.
static float centre_row(const float* x, const float* centre, float scale, int64_t D, float* out) {
    Vector sum = {};
    const Vector factor = VQOPS_BROADCAST(scale);
    int64_t i = 0;
    for (; i + VQOPS_WIDTH <= D; i += VQOPS_WIDTH) {
        const Vector value = (load(x + i) - load(centre + i)) * factor;
        *reinterpret_cast<UnalignedVector*>(out + i) = value;
        sum += value * value;
    }
    float total = 0;
    for (int lane = 0; lane < VQOPS_WIDTH; lane++) total += sum[lane];
    for (; i < D; i++) {
        out[i] = (x[i] - centre[i]) * scale;
        total += out[i] * out[i];
    }
    return total;
}

static double exact_cost(const double* x, const double* c, int64_t padded, bool cosine) {
    return cost_of(x, c, padded, cosine);
}

static double exact_dot(const double* x, const double* c, int64_t padded) { return dot(x, c, padded); }

static CodeFacts measure(const double* code, const double* weights, const double* centre, double scale, int64_t padded) {
    Lanes key = {}, square = {};
    for (int64_t i = 0; i < padded; i += 8) {
        const Lanes c = *reinterpret_cast<const Lanes*>(code + i);
        const Lanes e = (c - *reinterpret_cast<const Lanes*>(centre + i)) * scale;
        key += *reinterpret_cast<const Lanes*>(weights + i) * c;
        square += e * e;
    }
    return {add_lanes(key), add_lanes(square)};
}

constexpr Instructions instructions = {VQOPS_NAME, VQOPS_TILE, VQOPS_WIDTH, screen,  direct,
                                       centre_row, exact_cost, exact_dot,   measure};
