// The decision between the candidates that the fast pass leaves a row.
#pragma once

#include "search_inputs.h"

namespace vqops::cuda {

// Certified rows are written, rows with several candidates compared in float64, eight threads per pair, the rest
// queued for Scan.
template <class T, int kThreads, int kRows>
struct Decide {
    static constexpr int kPairs = kThreads / kLanes;
    struct Shared {
        double best[kRows], cost[kPairs];
        int32_t best_code[kRows], pairs;
        uint16_t pair[kRows * kCapacity];
    };

    SearchInputs<T> in;
    SearchOutputs out;

    // lists: in shared memory, of the rows from `first`.
    template <class Block>
    VQOPS_HOST_DEVICE void run(Block& block, Shared& shared, const Packed& codes, Candidates* lists, int64_t h,
                               int64_t first) const {
        block.for_threads_sync([&](int t) {
            if (t == 0) shared.pairs = 0;
        });
        block.for_threads_sync([&](int t) {
            for (int r = t; r < kRows; r += kThreads) {
                Candidates& list = lists[r];
                if (list.state != kSearched) continue;
                list.drop_excluded();
                shared.best_code[r] = list.count == 1 ? list.code[0] : -1;
                if (list.count > kCapacity) list.state = kQueued;
                if (list.count < 2 || list.count > kCapacity) continue;
                const int place = block.atomic_add(&shared.pairs, list.count);
                for (int i = 0; i < list.count; i++) shared.pair[place + i] = uint16_t(r * kCapacity + i);
            }
        });
        const int pairs = shared.pairs;
        auto sums = block.template registers<Doubles<2>>();
        for (int base = 0; base < pairs; base += kPairs) {
            block.for_threads([&](int t) {
                sums[t].v[0] = sums[t].v[1] = 0;
                if (base + t / kLanes >= pairs) return;
                const int pair = shared.pair[base + t / kLanes], r = pair / kCapacity;
                const int64_t code = in.codebook.offset(h, lists[r].code[pair % kCapacity]);
                add_lane(in, in.x.offset(h, first + r), code, t % kLanes, sums[t].v);
            });
            block.template shuffle_sum<kLanes>(sums);
            block.for_threads_sync([&](int t) {
                if (t % kLanes == 0)
                    shared.cost[t / kLanes] = in.cosine ? cosine_cost(sums[t].v[0], sums[t].v[1]) : sums[t].v[0];
            });
            block.for_threads_sync([&](int t) {
                for (int p = 0; p < kPairs && base + p < pairs && t == 0; p++) {
                    const int pair = shared.pair[base + p], r = pair / kCapacity;
                    const int32_t code = lists[r].code[pair % kCapacity];
                    if (!before(shared.cost[p], code, shared.best[r], shared.best_code[r])) continue;
                    shared.best[r] = shared.cost[p], shared.best_code[r] = code;
                }
            });
        }
        block.for_threads([&](int t) {
            for (int r = t; r < kRows && first + r < in.N; r += kThreads) {
                const Candidates& list = lists[r];
                if (list.state == kQueued) {
                    out.queue[h * in.N + block.atomic_add(&out.queued[h], 1)] = uint32_t(first + r);
                    continue;
                }
                int32_t code = -1;
                if (list.state == kSearched) code = shared.best_code[r];
                if (list.state == kZero && *codes.first != kUnmarked) code = *codes.first;
                out.indices[h * in.N + first + r] = code;
                if (!out.tiers) continue;
                block.atomic_add(&out.tiers[code < 0 ? kNoCode : list.count > 1 ? kDecided : kCertified], Count(1));
            }
        });
    }
};

// One block: 16 rows whose codes several blocks have screened, eight threads per row. A row's threshold is the least of
// all, its candidates those that do not exceed it.
template <class T>
struct MergeLists {
    static constexpr int kThreads = 128, kRows = kThreads / kLanes;
    typedef Decide<T, kThreads, kRows> Decisions;
    struct Shared {
        typename Decisions::Shared decisions;
        Candidates list[kRows];
    };

    SearchInputs<T> in;
    SearchOutputs out;
    Preparation packed;
    int64_t shares;

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t across() const { return uint32_t((in.N + kRows - 1) / kRows); }
    int64_t blocks() const { return in.H * across(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t h = uint32_t(block.index) / across(), first = int64_t(uint32_t(block.index) % across()) * kRows;
        const Candidates* const lists = out.lists + h * shares * in.N + first;
        // body(list, list of a share) for all shares of a thread's row.
        const auto each_share = [&](int t, auto body) {
            for (int64_t s = t % kLanes; s < shares && first + t / kLanes < in.N; s += kLanes)
                body(shared.list[t / kLanes], lists[s * in.N + t / kLanes]);
        };
        block.for_threads_sync([&](int r) {
            if (r < kRows) shared.list[r].clear(first + r < in.N ? lists[r].state : kOutside);
        });
        block.for_threads_sync([&](int t) {
            each_share(t, [&](Candidates& list, const Candidates& part) {
                block.atomic_min(&list.threshold, part.threshold);
            });
        });
        block.for_threads_sync([&](int t) {
            each_share(t, [&](Candidates& list, const Candidates& part) {
                // Some were not held: more than a list holds, so that the row is left.
                if (part.count > kCapacity) block.atomic_add(&list.count, kCapacity + 1);
                for (int i = 0; i < part.count && part.count <= kCapacity; i++) {
                    if (part.lower[i] > from_ordered(list.threshold)) continue;
                    const int place = block.atomic_add(&list.count, 1);
                    if (place < kCapacity) list.code[place] = part.code[i], list.lower[place] = part.lower[i];
                }
            });
        });
        Decisions{in, out}.run(block, shared.decisions, packed.head(h), shared.list, h, first);
    }
};

}  // namespace vqops::cuda
