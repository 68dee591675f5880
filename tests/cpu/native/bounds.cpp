// Both bounds of the screening pass against extended precision, on what rounds worst.

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../../csrc/cpu/codebook.h"
#include "../../../csrc/cpu/row_buffer.h"
#include "checks.h"

namespace vqops {

// The screening pass alone, of a tile of rows: every lower bound is at most the exact t = |c|^2 / 2 - x.c (scaled and
// centred), the upper bound that follows from it at least that and half of `rest`. So is the threshold, of the least t.
// `wanted` codes are asked for: one, so that some stay open, or all.
static void check_bounds(const char* name, const std::vector<float>& x, const std::vector<float>& c, int64_t D,
                         int64_t wanted) {
    const int64_t N = instructions().tile, K = int64_t(c.size()) / D;
    const Rows codes = {c.data(), DType::float32, K * D, D, 1};
    const CacheLines memory(Packed::bytes(K, D));
    pack_codebook(codes, 0, K, D, false, memory.data, two_threads());
    const Packed packed(memory.data, K, D);
    const CacheLines block(N * instructions().row_bytes(D)), work(instructions().screen_bytes(N, D, wanted));
    std::vector<const float*> vectors(N);
    for (int64_t n = 0; n < N; n++) vectors[n] = &x[n * D];
    std::vector<RowNorm> norms(N);
    instructions().place_rows({vectors.data(), N, D, packed.centre, packed.header->scale}, 0, block.data, norms.data());
    std::vector<float> threshold(N, INFINITY), rest(N);
    for (int64_t n = 0; n < N; n++) rest[n] = rest_of(norms[n].at_least, *packed.header);
    struct Seen {
        const char* name;
        const float *x, *c, *rest;
        const Packed* packed;
        int64_t D, count;

        long double exact(int64_t row, int64_t place) const {
            const int64_t k = packed->code[place];
            long double t = 0;
            for (int64_t i = 0; i < D; i++) {
                const long double scale = packed->header->scale, m = packed->centre[i];
                const long double X = (x[row * D + i] - m) * scale, C = (c[k * D + i] - m) * scale;
                t += C * C / 2 - X * C;
            }
            return t;
        }
    } seen = {name, x.data(), c.data(), rest.data(), &packed, D, 0};
    const auto candidate = [](void* self, int64_t row, int64_t place, float lower, float upper) {
        Seen& s = *static_cast<Seen*>(self);
        const long double t = s.exact(row, place);
        expect(lower <= t, "lower bound", s.name, place);
        expect(upper >= t + s.rest[row] / 2, "upper bound", s.name, place);
        s.count++;
    };
    const int64_t screened = packed.header->screened;
    const OpenCodes open = {threshold.data(), rest.data(), nullptr, nullptr, nullptr, INT32_MAX, 0, int32_t(screened),
                            &seen, nullptr, candidate, nullptr, int32_t(wanted), work.data};
    instructions().screen(block.data, N, packed.as_read(instructions()), open);
    expect(seen.count >= (wanted == 1 ? N : N * screened), "codes were left out", name, seen.count);
    for (int64_t n = 0; n < N; n++) {
        long double least = INFINITY;
        for (int64_t place = 0; place < screened; place++) least = std::min(least, seen.exact(n, place));
        expect(threshold[n] >= least + rest[n] / 2, "threshold", name, n);
    }
}

// Inputs that round worst: halfway between two bfloat16, of equal sign, with partial sums that grow past the powers of
// two, or so small that products underflow.
// `crowded`: codes so close to each other that a set with a second, more precise pass needs it, and leaves them open.
static void bounds(float x_scale, float c_scale, bool halfway, bool positive, bool crowded) {
    const int64_t N = instructions().tile, K = crowded ? 256 : 64;
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (const int64_t D : {1, 2, 7, 9, 10, 32, 64, 511}) {
        std::vector<float> x(N * D), c(K * D);
        const auto fill = [&](std::vector<float>& values, float scale) {
            for (float& value : values) {
                value = normal(random) * scale;
                if (positive) value = std::fabs(value);
                if (halfway) value = real(rounded<BFloat16>(value)) * (1 + 0x1p-8f - 0x1p-23f);
            }
        };
        fill(x, x_scale), fill(c, c_scale);
        for (int64_t i = D; crowded && i < K * D; i++)  // about three places, so that most are not at the centre
            c[i] = c[i % D] * (2 * float(i / D % 3) - 1) * (1 + float(i / D % 5) * 0x1p-22f);
        check_bounds("bounds", x, c, D, crowded ? 1 : K);
    }
}

// Only sums round, and all to one side: behind the first two of 32 products each is a little less than half of what
// would move their sum. The centre is zero, and all values are a bfloat16, or two where codes are crowded.
static void absorbed(bool crowded) {
    const int64_t N = instructions().tile, K = crowded ? 256 : 64, sampled = 64;
    for (const int64_t D : {4, 9, 10, 32, 64, 511}) {
        std::vector<float> x(N * D), c(K * D);
        for (int64_t i = 0; i < D; i++) {
            const bool first = i % 32 < 2;
            const float value = first ? 1 : 0x1p-12f * (1 - 0x1p-8f);
            for (int64_t n = 0; n < N; n++) x[n * D + i] = value * 0x1p44f;
            for (int64_t k = 1; k < K; k++) {
                const float factor = crowded ? 1 + (first ? float(k) * 0x1p-13f : 0) : std::ldexp(1.0f, int(k / 2));
                c[k * D + i] = value * factor * (k / (K / sampled) % 2 ? -1 : 1);
            }
        }
        check_bounds("absorbed", x, c, D, crowded ? 1 : K);
    }
}

// Half the square of a code, to which each step of 32 products adds a little less than half of its last bit.
static void small_steps() {
    const int64_t part = 2048, D = 3 * part;
    const std::vector<float> x(instructions().tile * D, -0x1p-26f * part / 32 * 0.9f);
    std::vector<float> c(3 * D);
    for (int64_t k = 0; k < 3; k++) std::fill_n(&c[k * D + k * part], part, 1);
    check_bounds("small steps", x, c, D, 1);
}

// More tiles of codes than are noted at a time, and rows so short that nearly all of a bound is the code's.
static void many_panels() {
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    const int64_t D = 40, K = 9000;
    std::vector<float> x(instructions().tile * D), c(K * D);
    for (float& value : x) value = normal(random) * 1e-6f;
    for (float& value : c) value = random() % 4 ? 0 : normal(random);  // so that the centre is zero
    check_bounds("many panels", x, c, D, K);
}

void bounds() {
    for (const bool halfway : {false, true})
        for (const bool positive : {false, true})
            for (const bool crowded : {false, true})
                for (const float scale : {1.0f, 1e-18f, 1e15f}) bounds(scale, 1, halfway, positive, crowded);
    bounds(1e-20f, 1e-20f, false, false, false);
    for (const bool crowded : {false, true}) absorbed(crowded);
    small_steps();
    many_panels();
}

}  // namespace vqops
