// EMA: two passes, since the smoothing needs the total of all cluster sizes. Read and written: the averages once, the
// codes once.

#include "ema.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../ema_step.h"

namespace vqops {
namespace {

// By the exponents, as integers: that takes a vector at a time, where a sum would wait for each addition.
bool all_finite(const float* values, int64_t D) {
    uint32_t any = 0;
    for (int64_t i = 0; i < D; i++) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        any |= (bits & 0x7f800000) == 0x7f800000;
    }
    return !any;
}

// `moved` is room for D values.
void move_average(const EmaHead& head, int64_t k, int64_t D, float decay, float* moved) {
    const float step = head.weight ? (1 - decay) * head.weight[k] : 1 - decay;
    const float count = head.counts ? float(head.counts[k]) : head.weighted_counts[k];
    const float size = lerp(head.size[k], count, step);
    float* average = head.average + k * D;
    const float* sums = head.sums + k * D;
    for (int64_t i = 0; i < D; i++) moved[i] = lerp(average[i], sums[i], step);
    if (!is_finite(size) || !all_finite(moved, D)) return;  // the code keeps its averages
    head.size[k] = size;
    std::copy(moved, moved + D, average);
}

}  // namespace

void ema_update(const EmaHead& head, int64_t K, int64_t D, float decay, float eps, bool cosine,
                const Parallel& parallel) {
    parallel.over(K, [&](int64_t begin, int64_t end) {
        std::vector<float> moved(D);
        for (int64_t k = begin; k < end; k++) move_average(head, k, D, decay, moved.data());
    });
    if (!head.codes) return;
    double sum = 0;
    for (int64_t k = 0; k < K; k++) sum += head.size[k];
    const float total = float(sum);
    parallel.over(K, [&](int64_t begin, int64_t end) {
        std::vector<float> code(D);
        for (int64_t k = begin; k < end; k++) {
            const float smoothed = smoothed_size(head.size[k], total, float(K), eps);
            for (int64_t i = 0; i < D; i++) code[i] = head.average[k * D + i] / smoothed;
            if (cosine) {
                double square = 0;
                for (int64_t i = 0; i < D; i++) square += double(code[i]) * code[i];
                const float norm = float(std::max(std::sqrt(square), kSmallestNorm));
                for (int64_t i = 0; i < D; i++) code[i] /= norm;
            }
            if (all_finite(code.data(), D)) std::copy(code.begin(), code.end(), head.codes + k * D);
        }
    });
}

}  // namespace vqops
