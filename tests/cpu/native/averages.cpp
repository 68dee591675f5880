// Statistics of codes, bit for bit: EMA updates, sums by code, gradients of codebooks.

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "../../../csrc/cpu/code_sums.h"
#include "../../../csrc/cpu/ema.h"
#include "../../../csrc/cpu/quantize_backward.h"
#include "../../../csrc/ema_step.h"
#include "checks.h"

namespace vqops {

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

}  // namespace vqops
