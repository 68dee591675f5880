// The CPU kernels without torch, for sanitizers and other processors: degenerate and adversarial shapes, each index
// checked against a plain double loop. Built and run by test_sanitizers.py and test_aarch64.py.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/codebook.h"
#include "../../../csrc/cpu/row_buffer.h"
#include "../../../csrc/noise.h"
#include "../../../csrc/cpu/ema.h"
#include "../../../csrc/ema_step.h"
#include "../../../csrc/cpu/quantize_backward.h"
#include "../../../csrc/cpu/gather.h"
#include "../../../csrc/cpu/hash.h"
#include "../../../csrc/cpu/sample.h"
#include "../../../csrc/cpu/search.h"
#include "../../../csrc/cpu/sets/bf16_model.h"
#include "../../../csrc/cpu/unprepared.h"
#include "checks.h"

using namespace vqops;

#if defined(__x86_64__)
#include <immintrin.h>
__attribute__((target("avx512f,avx512bf16"))) static float hardware_pair(float sum, uint32_t x, uint32_t c) {
    const __m512 added =
        _mm512_dpbf16_ps(_mm512_set1_ps(sum), __m512bh(_mm512_set1_epi32(int(x))), __m512bh(_mm512_set1_epi32(int(c))));
    return _mm512_cvtss_f32(added);
}
#endif

namespace {

void run(const Case& test, bool cosine) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const int64_t H = test.H, N = test.N, K = test.K, D = test.D;
    std::vector<float> x(H * N * D), c(H * K * D);
    for (float& value : x) value = normal(random) * test.x_scale + test.offset;
    for (int64_t k = 0; k < H * K; k++) {
        for (int64_t i = 0; i < D; i++) {
            const bool again = k % test.repeat != 0;
            c[k * D + i] = normal(random) * (again ? test.spread : test.c_scale);
            c[k * D + i] += again ? c[(k - 1) * D + i] : test.offset;
        }
    }
    if (test.specials) {
        const float values[] = {NAN, INFINITY, 3e38f, 0, 1e-42f, -1e30f};
        for (int s = 0; s < 6; s++) {
            for (int64_t i = 0; i < D; i++) c[s % K * D + i] = values[s];
            if (s < N) std::fill_n(&x[s * D], D, values[s]);
        }
    }
    std::vector<uint8_t> mask(H * N);
    for (auto& keep : mask) keep = random() % 8 != 0;

    const Rows rows = {x.data(), DType::float32, N * D, D, 1}, codes = {c.data(), DType::float32, K * D, D, 1};
    const RowMask kept = {reinterpret_cast<const bool*>(mask.data()), N, 1};
    const SearchShape shape = {H, N, K, D, cosine};
    const Parallel parallel = two_threads();
    std::vector<char> packed(H * Packed::bytes(K, D) + 64);
    void* memory = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);
    for (int64_t h = 0; h < H; h++)
        pack_codebook(codes, h, K, D, cosine, static_cast<char*>(memory) + h * Packed::bytes(K, D), parallel);

    std::vector<int64_t> indices(H * N), tiers(kTiers), again(H * N);
    search(shape, rows, codes, kept, memory, {indices.data(), 1, nullptr, tiers.data()}, parallel);
    const int64_t most = std::min<int64_t>(K, 5);
    std::vector<int64_t> several(H * N * most);
    std::vector<float> distances(H * N * most);
    search(shape, rows, codes, kept, memory, {several.data(), most, distances.data(), nullptr}, parallel);
    int64_t counted = 0;
    for (int64_t tier : tiers) counted += tier;
    expect(counted == H * N, "tiers do not add up", test.name, counted);
    for (int64_t n = 0; n < H * N; n++) {
        const float* row = &x[n * D];
        std::vector<std::pair<double, int64_t>> ranked;
        for (int64_t k = 0; mask[n] && finite(row, D) && k < K; k++) {
            const float* code = &c[(n / N * K + k) * D];
            if (finite(code, D)) ranked.push_back({cost(row, code, D, cosine), k});
        }
        const int64_t count = std::min<int64_t>(most, ranked.size());
        std::partial_sort(ranked.begin(), ranked.begin() + count, ranked.end());
        expect(indices[n] == (count ? ranked[0].second : -1), "wrong index", test.name, n);
        for (int64_t i = 0; i < most; i++)
            expect(several[n * most + i] == (i < count ? ranked[i].second : -1), "wrong one of several", test.name, n);
    }

    const int64_t seed[] = {-7, INT64_MAX - 20};
    for (const double temperature : {1e-30, 1e-3, 1.0, 1e20}) {
        draw_codes(shape, rows, codes, kept, temperature, seed, again.data(), parallel);
        for (int64_t n = 0; n < H * N; n++) {
            const float* row = &x[n * D];
            Drawn best = {0, 0, -1};
            for (int64_t k = 0; mask[n] && finite(row, D) && k < K; k++) {
                const float* code = &c[(n / N * K + k) * D];
                if (!finite(code, D)) continue;
                const double value = cost(row, code, D, cosine), norm = std::sqrt(exact_product(row, row, D));
                uint32_t words[4];
                philox(uint64_t(seed[0]), uint64_t(seed[1]) + uint64_t(n % N), uint32_t(k / 4), uint32_t(n / N), words);
                const double noise = temperature * gumbel(words[k % 4]);
                const Drawn drawn = {logit_of(value, norm, cosine) + noise, value, k};
                if (drawn.before(best)) best = drawn;
            }
            expect(again[n] == best.index, "wrong draw", test.name, n);
        }
    }

    std::vector<float> quantized(H * N * D), error(H * N), sums(H * K * D), average(H * K * D), size(H * K, 1);
    std::vector<int64_t> counts(H * K);
    search_and_gather(shape, rows, codes, kept, memory, again.data(), {quantized.data(), error.data(), cosine}, parallel);
    expect(again == indices, "indices of quantize", test.name, 0);
    search_and_gather(shape, rows, codes, kept, nullptr, again.data(), {quantized.data(), error.data(), false}, parallel);
    expect(again == indices, "indices without preparation", test.name, 0);
    const Indices chosen = {indices.data(), N, 1, K};
    expect(sum_codes(shape, rows, chosen, nullptr, {counts.data(), sums.data()}, parallel) < 0, "range", test.name, 0);
    const Rows g = {quantized.data(), DType::float32, N * D, D, 1}, e = {error.data(), DType::float32, N, 1, 1};
    std::vector<float> grad_x(H * N * D), grad_codebook(H * K * D);
    const BackwardInputs in = {&g, &e, rows, codes, chosen, kept, Passing::rotation, 1.0, cosine};
    expect(backward(shape, in, grad_x.data(), grad_codebook.data(), parallel) < 0, "range", test.name, 1);
    levels(test, shape, rows, codes, kept, memory, parallel);
    for (int64_t h = 0; h < H; h++)
        ema_update({K, D, 0.9f, 1e-5f, cosine, &size[h * K], &average[h * K * D], &c[h * K * D], &counts[h * K], nullptr,
                    &sums[h * K * D], nullptr},
                   parallel);
    indices.assign(H * N, K);
    if (N) expect(sum_codes(shape, rows, chosen, nullptr, {counts.data(), sums.data()}, parallel) == 0, "unnoticed index",
                  test.name, 2);
}

// The screening pass alone, of a tile of rows: every lower bound is at most the exact t = |c|^2 / 2 - x.c (scaled and
// centred), the upper bound that follows from it at least that and half of `rest`. So is the threshold, of the least t.
// `wanted` codes are asked for: one, so that some stay open, or all.
void check_bounds(const char* name, const std::vector<float>& x, const std::vector<float>& c, int64_t D,
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
void bounds(float x_scale, float c_scale, bool halfway, bool positive, bool crowded) {
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
void absorbed(bool crowded) {
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
void small_steps() {
    const int64_t part = 2048, D = 3 * part;
    const std::vector<float> x(instructions().tile * D, -0x1p-26f * part / 32 * 0.9f);
    std::vector<float> c(3 * D);
    for (int64_t k = 0; k < 3; k++) std::fill_n(&c[k * D + k * part], part, 1);
    check_bounds("small steps", x, c, D, 1);
}

// More tiles of codes than are noted at a time, and rows so short that nearly all of a bound is the code's.
void many_panels() {
    std::mt19937 random(8);
    std::normal_distribution<float> normal;
    const int64_t D = 40, K = 9000;
    std::vector<float> x(instructions().tile * D), c(K * D);
    for (float& value : x) value = normal(random) * 1e-6f;
    for (float& value : c) value = random() % 4 ? 0 : normal(random);  // so that the centre is zero
    check_bounds("many panels", x, c, D, K);
}

// A square rounded by itself, which no compiler may fuse with what it is added to. (Products of two floats are exact.)
double apart(double square) {
    volatile double rounded = square;
    return rounded;
}

// The vector forms of what decides are the scalar forms, bit for bit, at every length, and neither fuses anything.
void exact() {
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (int64_t D = 1; D < 70; D++) {
        std::vector<float> x(D), c(D);
        const AlignedRow wide_x(D), wide_c(D);
        for (int64_t i = 0; i < D; i++) {
            wide_x.data[i] = x[i] = normal(random) * std::exp(3 * normal(random));
            wide_c.data[i] = c[i] = normal(random);
        }
        double partial[kLanes] = {};
        for (int64_t i = 0; i < D; i++) {
            const double e = double(x[i]) - double(c[i]);
            partial[i % kLanes] += apart(e * e);
        }
        expect(exact_distance(x.data(), c.data(), D) == tree(partial), "fused squares", "exact", D);
        const Instructions& set = instructions();
        const float *a = x.data(), *b = c.data();
        expect(set.exact_distance(a, b, D) == exact_distance(a, b, D), "floats", "exact", D);
        for (const bool cosine : {false, true})
            expect(set.exact_cost(wide_x.data, wide_c.data, wide_x.padded, cosine) == cost(a, b, D, cosine), "doubles",
                   "exact", D);
        expect(set.dot(wide_x.data, wide_c.data, wide_x.padded) == exact_product(a, b, D), "dot", "exact", D);
    }
}

// An EMA update is plain loops over the arithmetic of ema_step.h, bit for bit, at every length: what is not finite moves
// nothing, neither its code nor the total.
void averages() {
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    const int64_t K = 37;
    const float eps = 1e-5f;
    for (int64_t D = 1; D < 40; D++)
        for (const float decay : {0.0f, 0.3f, 0.9f, 1.0f})
            for (const bool cosine : {false, true}) {
                std::vector<float> size(K), average(K * D), codes(K * D), sums(K * D), counts(K), weight(K);
                for (auto* values : {&average, &codes, &sums})
                    for (float& value : *values) value = normal(random);
                for (int64_t k = 0; k < K; k++)
                    size[k] = k % 5 ? float(k) : 0, counts[k] = float(random() % 9), weight[k] = float(random() % 5) / 4;
                sums[3 * D] = NAN, sums[9 * D - 1] = INFINITY, sums[15 * D + D / 2] = 3e38f, average[15 * D + D / 2] = -3e38f;
                counts[20] = INFINITY, counts[21] = NAN, weight[21] = 1;
                std::vector<float> new_size = size, new_average = average, new_codes = codes;
                for (int64_t k = 0; k < K; k++) {
                    const float step = (1 - decay) * weight[k], next = lerp(size[k], counts[k], step);
                    std::vector<float> moved(D);
                    for (int64_t i = 0; i < D; i++) moved[i] = lerp(average[k * D + i], sums[k * D + i], step);
                    if (!is_finite(next) || !finite(moved.data(), D)) continue;
                    new_size[k] = next;
                    std::copy(moved.begin(), moved.end(), &new_average[k * D]);
                }
                double total = 0;  // exact, so in any order: they have few bits
                for (int64_t k = 0; k < K; k++) total += new_size[k];
                for (int64_t k = 0; k < K; k++) {
                    std::vector<float> code(D);
                    const float n = smoothed_size(new_size[k], float(total), float(K), eps);
                    double square[4] = {};
                    for (int64_t i = 0; i < D; i++) code[i] = new_average[k * D + i] / n;
                    for (int64_t i = 0; i < D; i++) square[i % 4] += double(code[i]) * code[i];
                    const double norm = divisor((square[0] + square[2]) + (square[1] + square[3]));
                    if (!finite(code.data(), D)) continue;
                    for (int64_t i = 0; i < D; i++) new_codes[k * D + i] = cosine ? float(code[i] / norm) : code[i];
                }
                ema_update({K, D, decay, eps, cosine, size.data(), average.data(), codes.data(), nullptr, counts.data(),
                            sums.data(), weight.data()},
                           two_threads());
                expect(size == new_size && average == new_average && codes == new_codes, "values", "averages", D);
            }
}

// Sums by code are added in runs of 256, bit for bit, at every length, whatever the threads; and so is the gradient of a
// codebook, where the rows' gradients are those of straight-through.
void sums() {
    std::mt19937 random(6);
    std::normal_distribution<float> normal;
    const Parallel alone = {1, [](int64_t size, const std::function<void(int64_t, int64_t)>& body) { body(0, size); }};
    const int64_t N = 700;
    for (int64_t D = 1; D < 40; D++)
        for (const int64_t K : {1, 3, 50}) {
            std::vector<float> x(N * D), q(K * D), g(N * D), error(N), expected(K * D), grad(K * D);
            for (auto* values : {&x, &q, &g, &error})
                for (float& value : *values) value = normal(random);
            std::vector<int64_t> indices(N), counts(K);
            for (int64_t& k : indices) k = int64_t(random() % (K + 1)) - 1;
            const auto add = [&](std::vector<float>& sums, const auto& row) {
                for (int64_t k = 0; k < K; k++) {
                    std::vector<float> run(D), total(D);
                    counts[k] = 0;
                    const auto fold = [&] {
                        for (int64_t i = 0; i < D; i++) total[i] += run[i], run[i] = 0;
                    };
                    for (int64_t n = 0; n < N; n++) {
                        if (indices[n] != k) continue;
                        for (int64_t i = 0; i < D; i++) run[i] += row(n, i);
                        if (++counts[k] % kRun == 0) fold();
                    }
                    fold();
                    std::copy(total.begin(), total.end(), &sums[k * D]);
                }
            };
            const auto from_error = [&](int64_t n, int64_t i) {
                return 2 * (x[n * D + i] - q[std::max<int64_t>(indices[n], 0) * D + i]) * error[n];
            };
            add(expected, [&](int64_t n, int64_t i) { return x[n * D + i]; });
            add(grad, [&](int64_t n, int64_t i) { return from_error(n, i) * -0.25f; });
            const SearchShape shape = {1, N, K, D, false};
            const Rows rows = {x.data(), DType::float32, 0, D, 1}, codes = {q.data(), DType::float32, 0, D, 1};
            const Rows of_g = {g.data(), DType::float32, 0, D, 1}, of_error = {error.data(), DType::float32, 0, 1, 1};
            const Indices chosen = {indices.data(), 0, 1, K};
            for (const Parallel& parallel : {alone, two_threads()}) {
                std::vector<float> found(K * D, NAN), grad_x(N * D, NAN), grad_codebook(K * D, NAN);
                std::vector<int64_t> count(K, -1);
                expect(sum_codes(shape, rows, chosen, nullptr, {count.data(), found.data()}, parallel) < 0, "range",
                       "sums", D);
                expect(found == expected && count == counts, "values", "sums", D);
                for (const Rows* given : {&of_error, static_cast<const Rows*>(nullptr)}) {
                    const BackwardInputs in = {&of_g, given, rows, codes, chosen, {}, Passing::straight_through, 0.25,
                                               false};
                    backward(shape, in, grad_x.data(), grad_codebook.data(), parallel);
                    bool right = true;
                    for (int64_t n = 0; n < N; n++)
                        for (int64_t i = 0; i < D; i++) {
                            const float value = grad_x[n * D + i], passed = g[n * D + i];
                            if (!given) right &= value == passed;
                            else right &= indices[n] < 0 ? value != value : value == passed + from_error(n, i);
                        }
                    expect(right, "gradient of x", "sums", D);
                    expect(grad_codebook == (given ? grad : std::vector<float>(K * D)), "gradient of codes", "sums", D);
                }
            }
        }
}

// All 65536 half-precision patterns survive a round trip; NaN stays NaN.
void conversions() {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const float half = real(Float16{uint16_t(bits)}), brain = real(BFloat16{uint16_t(bits)});
        const Float16 half_again = rounded<Float16>(half);
        const BFloat16 brain_again = rounded<BFloat16>(brain);
        expect(std::isnan(half) ? std::isnan(real(half_again)) : half_again.bits == bits, "float16", "conversions",
               bits);
        expect(std::isnan(brain) ? std::isnan(real(brain_again)) : brain_again.bits == bits, "bfloat16", "conversions",
               bits);
    }
}

// The model of vdpbf16ps is the instruction, bit for bit, where there is one.
void model() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx512bf16")) return;
    std::mt19937 random(3);
    for (int64_t n = 0; n < 200000; n++) {
        // Exponents close together, so that sums round; some denormal, some of extreme exponents.
        const auto half = [&] {
            const uint32_t exponent = n % 4 ? 120 + random() % 16 : n % 8 ? random() % 4 : 60 + random() % 8;
            return (random() & 1) << 15 | exponent << 7 | (random() & 127);
        };
        const uint32_t x = half() | half() << 16, c = half() | half() << 16;
        float sum = real(BFloat16{uint16_t(half())}) * (1 + float(random() % 65536) * 0x1p-24f);
        if (n % 16 == 5) sum = std::ldexp(sum, -60);
        const float modelled = add_pair(sum, x, c), found = hardware_pair(sum, x, c);
        expect(std::memcmp(&modelled, &found, 4) == 0, "vdpbf16ps", "model", n);
    }
#endif
}

// The lanes of a hash one by one; and a change of one or two bytes shows, whatever the threads.
void hashes() {
    std::mt19937 random(5);
    for (const int64_t bytes : {0, 1, 4, 255, 256, 260, 4096, 262140, 262144, 262145, 700001}) {
        std::vector<char> memory(bytes);
        for (char& byte : memory) byte = char(random());
        const auto hash = [&](uint64_t seed) { return hash_of(memory.data(), bytes, seed, two_threads()); };
        const uint64_t before = hash(3);
        const Parallel alone = {1, [](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
                                    if (size > 0) body(0, size);
                                }};
        expect(hash_of(memory.data(), bytes, 3, alone) == before && hash(4) != before, "threads, seed", "hash", bytes);
        for (int i = 0; i < 100 && bytes > 0; i++) {
            const int64_t one = random() % bytes, other = (one + 256 * (1 + random() % 9)) % bytes;
            const char bit = char(i % 2 ? 0x80 : 1 << random() % 8);
            memory[one] ^= bit;
            expect(hash(3) != before, "a byte that changed", "hash", one);
            memory[other] ^= bit;
            expect(one == other || hash(3) != before, "two bytes that changed", "hash", one);
            memory[one] ^= bit, memory[other] ^= bit;
        }
        HashLanes lanes{}, expected{};
        const int64_t words = bytes / int64_t(sizeof(expected.value)) * kHashLanes;
        instructions().absorb(memory.data(), words / kHashLanes, lanes);
        for (int64_t i = 0; i < words; i++) {
            uint32_t word, &value = expected.value[i % kHashLanes];
            std::memcpy(&word, memory.data() + i * 4, 4);
            value = (value ^ word) * 0x9e3779b1;
            value ^= value >> 15;
            expected.sum[i % kHashLanes] += value;
        }
        expect(std::memcmp(&lanes, &expected, sizeof(lanes)) == 0, "lanes", "hash", bytes);
    }
}

}  // namespace

int main() {
    const Case cases[] = {
        {"plain", 2, 131, 70, 13, 1, 1, 0, 1, 0, false},
        {"one code", 1, 9, 1, 1, 1, 1, 0, 1, 0, false},
        {"no rows", 1, 0, 5, 3, 1, 1, 0, 1, 0, false},
        {"one dimension", 1, 40, 33, 1, 1, 1, 0, 1, 0, false},
        {"several panels", 1, 200, 300, 34, 1, 1, 0, 1, 0, false},
        {"far off", 1, 60, 40, 9, 1, 1, 1e4f, 1, 0, false},
        {"repeated", 1, 50, 96, 8, 1, 1, 0, 3, 0, false},
        {"identical", 1, 50, 200, 8, 1, 1, 0, 200, 0, false},
        {"clusters", 1, 120, 200, 8, 1, 1, 0, 50, 1e-4f, false},
        {"identical, in parts", 1, 50, 200, 64, 1, 1, 0, 200, 0, false},
        {"clusters, in parts", 1, 60, 200, 64, 1, 1, 0, 50, 1e-7f, false},
        {"tight clusters", 1, 120, 200, 8, 1, 1, 0, 50, 1e-7f, false},
        {"collapsed", 1, 50, 300, 8, 1e-7f, 1e-7f, 1, 1, 0, false},
        {"zero codebook", 1, 30, 40, 8, 1, 0, 0, 1, 0, false},
        {"clusters within a bfloat16", 1, 800, 400, 40, 1, 1, 0, 200, 2e-3f, false},
        {"more than lists hold", 1, 90, 1200, 40, 1, 1, 0, 600, 2e-3f, false},
        {"many panels", 1, 40, 9000, 12, 1, 1, 0, 1, 0, false},
        {"many panels, clusters", 1, 40, 9000, 12, 1, 1, 0, 300, 1e-3f, false},
        {"specials", 1, 40, 40, 17, 1, 1, 0, 1, 0, true},
        {"denormal", 1, 40, 40, 8, 1e-41f, 1e-41f, 0, 1, 0, false},
        {"huge rows", 1, 20, 40, 8, 1e30f, 1, 0, 1, 0, false},
        {"tiny rows", 1, 50, 300, 6, 1e-20f, 1, 0, 1, 0, false},
        {"deep", 1, 7, 20, 3000, 1, 1, 0, 1, 0, false},
    };
    for (const Case& test : cases)
        for (const bool cosine : {false, true}) run(test, cosine);
    for (const bool halfway : {false, true})
        for (const bool positive : {false, true})
            for (const bool crowded : {false, true})
                for (const float scale : {1.0f, 1e-18f, 1e15f}) bounds(scale, 1, halfway, positive, crowded);
    bounds(1e-20f, 1e-20f, false, false, false);
    for (const bool crowded : {false, true}) absorbed(crowded);
    small_steps();
    many_panels();
    exact();
    averages();
    sums();
    hashes();
    conversions();
    model();
    tiles();
    modes();
    std::printf("%s: %d failures\n", instructions().name, failures);
    return failures != 0;
}
