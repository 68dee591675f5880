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
#include "../../../csrc/cpu/quantize_backward.h"
#include "../../../csrc/cpu/gather.h"
#include "../../../csrc/cpu/hash.h"
#include "../../../csrc/cpu/sample.h"
#include "../../../csrc/cpu/search.h"
#include "../../../csrc/cpu/unprepared.h"
#include "checks.h"

using namespace vqops;

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
    bounds();
    exact();
    averages();
    sums();
    hashes();
    conversions();
    models();
    modes();
    std::printf("%s: %d failures\n", instructions().name, failures);
    return failures != 0;
}
