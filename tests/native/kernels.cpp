// The CPU kernels without torch, for address and undefined-behaviour sanitizers: degenerate and adversarial shapes, each
// index checked against a plain double loop. Built and run by tests/test_sanitizers.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/codebook.h"
#include "../../csrc/cpu/ema.h"
#include "../../csrc/cpu/gradient.h"
#include "../../csrc/cpu/quantize.h"
#include "../../csrc/cpu/search.h"

using namespace vqops;

namespace {

int failures = 0;

void expect(bool holds, const char* what, const char* name, int64_t where) {
    if (holds) return;
    std::printf("%s: %s at %lld\n", name, what, static_cast<long long>(where));
    failures++;
}

Parallel two_threads() {
    return {2, [](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
                const int64_t half = (size + 1) / 2;
                std::thread other([&] { if (half < size) body(half, size); });
                body(0, half);
                other.join();
            }};
}

// The cost of csrc/exact.h in the plainest form.
double cost(const float* x, const float* c, int64_t D, bool cosine) {
    double p[8] = {}, square[8] = {};
    for (int64_t i = 0; i < D; i++) {
        const double e = double(x[i]) - c[i];
        p[i % 8] += cosine ? double(x[i]) * c[i] : e * e;
        square[i % 8] += double(c[i]) * c[i];
    }
    const auto tree = [](const double* s) { return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])); };
    if (!cosine) return tree(p);
    const double norm = std::sqrt(tree(square));
    return norm > 0 ? -tree(p) / norm : 0;
}

bool finite(const float* row, int64_t D) {
    for (int64_t i = 0; i < D; i++)
        if (!std::isfinite(row[i])) return false;
    return true;
}

struct Case {
    const char* name;
    int64_t H, N, K, D;
    float x_scale, c_scale, offset;
    int repeat;      // each code stands this many times
    bool specials;   // NaN, Inf, huge, zero and denormal rows and codes
};

void run(const Case& test, bool cosine) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const int64_t H = test.H, N = test.N, K = test.K, D = test.D;
    std::vector<float> x(H * N * D), c(H * K * D);
    for (float& value : x) value = normal(random) * test.x_scale + test.offset;
    for (int64_t k = 0; k < H * K; k++)
        for (int64_t i = 0; i < D; i++)
            c[k * D + i] = k % test.repeat ? c[(k - 1) * D + i] : normal(random) * test.c_scale + test.offset;
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

    std::vector<int64_t> indices(H * N), tiers(kTiers);
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
        int64_t best = -1;
        double least = INFINITY;
        for (int64_t k = 0; mask[n] && finite(row, D) && k < K; k++) {
            const float* code = &c[(n / N * K + k) * D];
            if (!finite(code, D)) continue;
            const double value = cost(row, code, D, cosine);
            if (best < 0 || value < least) best = k, least = value;
        }
        expect(indices[n] == best, "wrong index", test.name, n);
        expect(several[n * most] == best, "wrong first of several", test.name, n);
    }

    std::vector<float> quantized(H * N * D), error(H * N), sums(H * K * D), average(H * K * D), size(H * K, 1);
    std::vector<int64_t> counts(H * K);
    gather_codes(shape, rows, codes, kept, indices.data(), quantized.data(), error.data(), parallel);
    const Indices chosen = {indices.data(), N, 1};
    expect(sum_codes(shape, rows, chosen, nullptr, {counts.data(), sums.data()}, parallel) < 0, "range", test.name, 0);
    const Rows g = {quantized.data(), DType::float32, N * D, D, 1}, e = {error.data(), DType::float32, N, 1, 1};
    std::vector<float> grad_x(H * N * D), grad_codebook(H * K * D);
    const GradientInputs in = {&g, &e, rows, codes, chosen, kept, Passing::rotation, 1.0};
    expect(gradient(shape, in, grad_x.data(), grad_codebook.data(), parallel) < 0, "range", test.name, 1);
    for (int64_t h = 0; h < H; h++)
        ema_update({&size[h * K], &average[h * K * D], &c[h * K * D], &counts[h * K], nullptr, &sums[h * K * D], nullptr},
                   K, D, 0.9f, 1e-5f, cosine, parallel);
    indices.assign(H * N, K);
    if (N) expect(sum_codes(shape, rows, chosen, nullptr, {counts.data(), sums.data()}, parallel) == 0, "unnoticed index",
                  test.name, 2);
}

// All 65536 half-precision patterns survive a round trip; NaN stays NaN.
void conversions() {
    for (uint32_t bits = 0; bits < 65536; bits++) {
        const float half = from_float16(uint16_t(bits)), brain = from_bfloat16(uint16_t(bits));
        expect(std::isnan(half) ? std::isnan(from_float16(to_float16(half))) : to_float16(half) == bits, "float16",
               "conversions", bits);
        expect(std::isnan(brain) ? std::isnan(from_bfloat16(to_bfloat16(brain))) : to_bfloat16(brain) == bits,
               "bfloat16", "conversions", bits);
    }
}

}  // namespace

int main() {
    const Case cases[] = {
        {"plain", 2, 131, 70, 13, 1, 1, 0, 1, false},       {"one code", 1, 9, 1, 1, 1, 1, 0, 1, false},
        {"no rows", 1, 0, 5, 3, 1, 1, 0, 1, false},         {"one dimension", 1, 40, 33, 1, 1, 1, 0, 1, false},
        {"far off", 1, 60, 40, 9, 1, 1, 1e4f, 1, false},    {"repeated", 1, 50, 96, 8, 1, 1, 0, 3, false},
        {"identical", 1, 50, 200, 8, 1, 1, 0, 200, false},  {"collapsed", 1, 50, 300, 8, 1e-7f, 1e-7f, 1, 1, false},
        {"zero codebook", 1, 30, 40, 8, 1, 0, 0, 1, false}, {"specials", 1, 40, 40, 17, 1, 1, 0, 1, true},
        {"denormal", 1, 40, 40, 8, 1e-41f, 1e-41f, 0, 1, false},
        {"huge rows", 1, 20, 40, 8, 1e30f, 1, 0, 1, false}, {"deep", 1, 7, 20, 3000, 1, 1, 0, 1, false},
    };
    for (const Case& test : cases)
        for (const bool cosine : {false, true}) run(test, cosine);
    conversions();
    std::printf("%s: %d failures\n", instructions().name, failures);
    return failures != 0;
}
