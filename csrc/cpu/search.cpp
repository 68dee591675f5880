// Search: the nearest code of each row, certified exact. A task is a block of rows against all codes (screen.h); a
// thread takes the next one when it is done.

#include "search.h"

#include <atomic>

#include "screen.h"
#include "unprepared.h"

namespace vqops {

void search(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask, const void* memory,
            const SearchResult& result, const Parallel& parallel, const Follow& follow) {
    if (memory == nullptr) {
        const DefaultFloatMode mode;
        search_unprepared(shape, x, codebook, mask, result, parallel);
        for (int64_t h = 0; follow && h < shape.H; h++) follow(h, 0, shape.N);
        return;
    }
    const int64_t share = (shape.H * shape.N + parallel.threads - 1) / parallel.threads;
    const int64_t rows = rows_of_block(instructions(), shape.D, share);
    const int64_t blocks_per_head = (shape.N + rows - 1) / rows;
    const std::unique_ptr<PreciseCodebook> precise = precise_codebook(shape, codebook);
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> totals[kTiers] = {};
    parallel.over(std::min<int64_t>(parallel.threads, shape.H * blocks_per_head), [&](int64_t, int64_t) {
        const DefaultFloatMode mode;
        Screen screen(instructions(), shape, x, codebook, mask, result, rows);
        for (int64_t task; (task = next++) < shape.H * blocks_per_head;) {
            const int64_t h = task / blocks_per_head, begin = task % blocks_per_head * rows;
            const char* head = static_cast<const char*>(memory) + h * Packed::bytes(shape.K, shape.D);
            const Packed packed(head, shape.K, shape.D);
            const int64_t end = std::min(begin + rows, shape.N);
            screen.run(h, begin, end, packed, precise.get(), h);
            if (follow) follow(h, begin, end);
        }
        for (int tier = 0; tier < kTiers; tier++) totals[tier] += screen.rows_of(Tier(tier));
    });
    for (int tier = 0; result.tiers && tier < kTiers; tier++) result.tiers[tier] += totals[tier];
}

}  // namespace vqops
