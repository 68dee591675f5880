// EMA: two passes, since the smoothing needs the total of all cluster sizes. Read and written: the averages once, the
// codes once.

#include "ema.h"

#include <algorithm>
#include <cmath>

#include "../ema_step.h"
#include "quantize.h"

namespace vqops {
namespace {

void move_average(const EmaHead& head, int64_t k, int64_t D, float decay) {
    const float step = head.weight ? (1 - decay) * head.weight[k] : 1 - decay;
    const float count = head.counts ? float(head.counts[k]) : head.weighted_counts[k];
    const float size = lerp(head.size[k], count, step);
    float *average = head.average + k * D, zero = 0 * size;
    const float* sums = head.sums + k * D;
    for (int64_t i = 0; i < D; i++) zero += 0 * lerp(average[i], sums[i], step);
    if (zero != 0) return;  // NaN: something is not finite, so the code keeps its averages
    head.size[k] = size;
    for (int64_t i = 0; i < D; i++) average[i] = lerp(average[i], sums[i], step);
}

}  // namespace

void ema_update(const EmaHead& head, int64_t K, int64_t D, float decay, float eps, bool cosine,
                const Parallel& parallel) {
    parallel.over(K, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; k++) move_average(head, k, D, decay);
    });
    if (!head.codes) return;
    double sum = 0;
    for (int64_t k = 0; k < K; k++) sum += head.size[k];
    const float total = float(sum);
    parallel.over(K, [&](int64_t begin, int64_t end) {
        std::vector<float> code(D);
        for (int64_t k = begin; k < end; k++) {
            const float smoothed = smoothed_size(head.size[k], total, float(K), eps);
            float zero = 0;
            double square = 0;
            for (int64_t i = 0; i < D; i++) {
                code[i] = head.average[k * D + i] / smoothed;
                square += double(code[i]) * code[i];
            }
            const float norm = cosine ? float(std::max(std::sqrt(square), kSmallestNorm)) : 1;
            for (int64_t i = 0; i < D; i++) zero += 0 * (code[i] /= norm);
            if (zero == 0) std::copy(code.begin(), code.end(), head.codes + k * D);
        }
    });
}

}  // namespace vqops
