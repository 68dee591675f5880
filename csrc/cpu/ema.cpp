// EMA: two passes, since the smoothing needs the total of all cluster sizes. Read: the averages twice, the sums once.
// Written: the averages once, the codes once. The rows are in sets/ema.inl.

#include "ema.h"

#include <vector>

namespace vqops {
namespace {

// In eight partial sums, so that no addition waits for the one before.
float total_size(const EmaHead& head) {
    double part[8] = {};
    int64_t k = 0;
    for (; k + 8 <= head.K; k += 8)
        for (int j = 0; j < 8; j++) part[j] += head.size[k + j];
    for (; k < head.K; k++) part[k % 8] += head.size[k];
    return float(((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7])));
}

}  // namespace

void ema_update(const EmaHead& head, const Parallel& parallel) {
    const Instructions& set = instructions();
    std::vector<float> largest(head.K);
    parallel.over(head.K, [&](int64_t begin, int64_t end) { set.move_averages(head, begin, end, largest.data()); });
    if (!head.codes) return;
    const float total = total_size(head);
    parallel.over(head.K, [&](int64_t begin, int64_t end) { set.move_codes(head, total, begin, end, largest.data()); });
}

}  // namespace vqops
