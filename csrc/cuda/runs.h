// Rows sorted by code, so that sums are added in the order of the reference, under
// torch.use_deterministic_algorithms(True). By default rows are ordered within a block alone (code_sums.h).
//
// A stable sort by code leaves the rows of a code side by side, ascending. They are cut in runs of 256. A block adds up
// one run in order; codes of more than one run leave partial sums, which Fold adds in order. A code that has all the
// rows is thus spread over N / 256 blocks.
// Workspace: 16 bytes per row for the sort (and its own), D / 32 bytes per row for partial sums.
// Bytes: 24 per row written and read once, and two to four passes of the sort over 8 per row.
#pragma once

#include "../contract.h"
#include "../tensors.h"
#include "block.h"
#include "memory.h"

namespace vqops::cuda {

// Order of the rows of a block: as they lie, ordered by code within the block (batch.h), or as a run of
// the sort.
enum class Order { memory, within_block, sorted };

struct Run {
    int64_t code;
    int64_t begin, end;  // places in the sorted order
    int64_t slot;        // of its partial sum, for codes of several runs
    bool first, several;
};

// Codes are those of all heads in a row, and so are rows: h K + k, h N + n. Code H K has the rows that are left out.
struct RowsByCode {
    int64_t H, N, K;
    Indices indices;  // [H, N]
    // The rest only for the sorted order.
    uint32_t *key = nullptr, *row = nullptr;     // [H N] as given, then
    uint32_t *keys = nullptr, *order = nullptr;  // [H N] sorted: keys ascending, rows (h N + n) ascending within a key
    uint32_t* start = nullptr;                   // [H K + 2] where each key begins
    uint32_t* several = nullptr;                 // [1 + H N / 257] how many codes have several runs, and which
    void* temporary = nullptr;                   // of the sort
    size_t temporary_bytes = 0;

    void take(Memory& memory, size_t bytes_of_sort) {
        key = memory.take<uint32_t>(rows()), row = memory.take<uint32_t>(rows());
        keys = memory.take<uint32_t>(rows()), order = memory.take<uint32_t>(rows());
        start = memory.take<uint32_t>(codes() + 2);
        several = memory.take<uint32_t>(1 + rows() / (kRun + 1));
        temporary = memory.take<char>(int64_t(bytes_of_sort)), temporary_bytes = bytes_of_sort;
    }

    VQOPS_HOST_DEVICE bool sorted() const { return order; }
    VQOPS_HOST_DEVICE int64_t rows() const { return H * N; }
    VQOPS_HOST_DEVICE int64_t codes() const { return H * K; }

    VQOPS_HOST_DEVICE uint32_t code_of(int64_t row) const {
        const int64_t h = uint32_t(row) / uint32_t(N), k = indices.at(h, row - h * N);
        return uint32_t(k >= 0 ? h * K + k : codes());
    }

    VQOPS_HOST_DEVICE int64_t slots() const { return H * N / (kRun / 2) + 1; }

    template <Order order>
    VQOPS_HOST_DEVICE int64_t batches() const {
        return order == Order::sorted ? items() : (rows() + kRun - 1) / kRun;
    }

    // Blocks that cover all runs. Code c owns the items from first_item(c) to first_item(c + 1): at least one, and
    // never fewer than its runs, since ceil(n / 256) <= floor((s + n) / 256) - floor(s / 256) + 1.
    VQOPS_HOST_DEVICE int64_t items() const { return first_item(codes() + 1, rows()); }
    VQOPS_HOST_DEVICE int64_t first_item(int64_t code, int64_t begins) const { return begins / kRun + code; }

    // False for an item that has no rows.
    VQOPS_HOST_DEVICE bool run_of(int64_t item, Run& run) const {
        int64_t low = 0, high = codes();
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (first_item(middle, start[middle]) <= item) low = middle;
            else high = middle - 1;
        }
        const int64_t begins = start[low], ends = start[low + 1], number = item - first_item(low, begins);
        run.code = low;
        run.begin = begins + number * kRun;
        run.end = run.begin + kRun < ends ? run.begin + kRun : ends;
        run.first = number == 0;
        run.several = low < codes() && ends - begins > kRun;
        // Only codes of more than 256 rows have slots, and ceil(n / 256) <= floor(n / 128) for n > 256.
        run.slot = begins / (kRun / 2) + number;
        return run.begin < ends;
    }

    VQOPS_HOST_DEVICE int64_t count(int64_t code) const { return int64_t(start[code + 1]) - int64_t(start[code]); }
};

// One thread per row: its key.
struct Keys {
    static constexpr int kThreads = 256;
    struct Shared {};
    RowsByCode sorted;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (sorted.rows() + kThreads - 1) / kThreads; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.for_threads([&](int t) {
            const int64_t i = block.index * kThreads + t;
            if (i >= sorted.rows()) return;
            sorted.key[i] = sorted.code_of(i);
            sorted.row[i] = uint32_t(i);
        });
    }
};

// One thread per code: where its rows begin, by bisection.
struct Starts {
    static constexpr int kThreads = 256;
    struct Shared {};
    RowsByCode sorted;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (sorted.codes() + 2 + kThreads - 1) / kThreads; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.for_threads([&](int t) {
            const int64_t code = block.index * kThreads + t;
            if (code == 0) sorted.several[0] = 0;
            if (code > sorted.codes() + 1) return;
            int64_t low = 0, high = sorted.rows();
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                if (int64_t(sorted.keys[middle]) < code) low = middle + 1;
                else high = middle;
            }
            sorted.start[code] = uint32_t(low);
        });
    }
};

// `device.sort` sorts keys with their rows, stably.
template <class Device>
void sort_by_code(const Device& device, const RowsByCode& sorted) {
    device.launch(Keys{sorted});
    device.sort(sorted);
    device.launch(Starts{sorted});
}

}  // namespace vqops::cuda
