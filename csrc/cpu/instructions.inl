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

constexpr Instructions instructions = {VQOPS_NAME, VQOPS_TILE, screen, centre_row, exact_cost, exact_dot, measure};
