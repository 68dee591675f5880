// The rows that a block adds up: up to 256, those of a code side by side, ascending.
//
// Within a block the rows, neighbours in memory, are ordered like this: groups of 32 by counting the smaller ones, then
// a row's place is the sum of its places in the 8 groups, by bisection. That takes three steps and no memory but
// shared; a bitonic sort takes 36 steps.
#pragma once

#include "runs.h"

namespace vqops::cuda {

struct Batch {
    uint32_t code[kRun + 1];  // behind the last row another one
    uint32_t row[kRun];

    // Whether p is the last row of its code.
    VQOPS_HOST_DEVICE bool ends(int p) const { return code[p] != code[p + 1]; }
};

// Shared memory that is free again when the rows are in order.
struct BatchScratch {
    alignas(16) uint32_t key[kRun];  // 24 bits of the code and the place in memory, so that no two are equal
    uint32_t grouped[kRun];          // the keys, ordered within each group
    uint32_t code[kRun];
};

// Fills `batch` and returns how many rows it has; all threads call it. `run` is what the sorted order knows of them.
// Codes of more than 24 bits may mix with those of the same lower ones: that takes more sums, none of them wrong.
template <Order order, int kThreads, class Block>
VQOPS_HOST_DEVICE int take_batch(const Block& block, Batch& batch, BatchScratch& scratch, const RowsByCode& by_code,
                                 int64_t item, Run& run) {
    if (order != Order::sorted) {
        run.begin = item * kRun;
        run.end = run.begin + kRun < by_code.rows() ? run.begin + kRun : by_code.rows();
    } else if (!by_code.run_of(item, run)) {
        return 0;
    }
    const int rows = int(run.end - run.begin);
    const uint32_t behind = ~0u;
    block.for_threads_sync([&](int t) {
        for (int p = t; p < kRun; p += kThreads) {
            const int64_t place = run.begin + p;
            uint32_t code = behind;
            if (p < rows) code = order == Order::sorted ? uint32_t(run.code) : by_code.code_of(place);
            if (order == Order::within_block) {
                scratch.code[p] = code;
                scratch.key[p] = code << 8 | uint32_t(p);
            } else {
                batch.code[p] = code;
                if (p < rows) batch.row[p] = order == Order::sorted ? by_code.order[place] : uint32_t(place);
            }
        }
        if (t == 0) batch.code[kRun] = behind;
    });
    if (order != Order::within_block) return rows;
    constexpr int kGroup = 32;
    block.for_threads_sync([&](int t) {
        for (int p = t; p < kRun; p += kThreads) {
            const uint32_t* const group = scratch.key + p / kGroup * kGroup;
            const uint32_t key = scratch.key[p];
            int place = p / kGroup * kGroup;
            VQOPS_UNROLL(32)
            for (int j = 0; j < kGroup; j++) place += group[j] < key;
            scratch.grouped[place] = key;
        }
    });
    block.for_threads_sync([&](int t) {
        for (int p = t; p < kRun; p += kThreads) {
            const uint32_t key = scratch.grouped[p];
            int place = 0;
            VQOPS_UNROLL(8)
            for (int group = 0; group < kRun; group += kGroup) {
                int low = group;
                VQOPS_UNROLL(5)
                for (int step = kGroup / 2; step > 0; step /= 2)
                    if (scratch.grouped[low + step - 1] < key) low += step;
                place += low - group + (scratch.grouped[low] < key);
            }
            const uint32_t from = key & (kRun - 1);
            batch.code[place] = scratch.code[from];
            batch.row[place] = uint32_t(run.begin) + from;
        }
    });
    return rows;
}

constexpr int kAhead = 8;

// Adds rows of a batch to `sum`, from first to last - 1, both multiples of 8; the sum is handed on behind the last row
// of each code, and what is behind all rows never is. `read(base, values)` reads eight values before any sum is handed
// on: nothing is read ahead of an atomic operation, which may have changed it.
template <class T, class Read, class Give>
VQOPS_HOST_DEVICE T add_rows(const Batch& batch, int first, int last, T sum, const Read& read, const Give& give) {
    for (int base = first; base < last; base += kAhead) {
        T values[kAhead];
        read(base, values);
        VQOPS_UNROLL(8)
        for (int j = 0; j < kAhead; j++) {
            sum += values[j];
            if (batch.ends(base + j)) {
                give(batch.code[base + j], sum);
                sum = 0;
            }
        }
    }
    return sum;
}

VQOPS_HOST_DEVICE int whole_reads(int rows) { return (rows + kAhead - 1) / kAhead * kAhead; }

}  // namespace vqops::cuda
