// Rows brought together by code, so that sums are added in the order of the reference without atomics.
//
// A stable sort by code leaves the rows of a code side by side, ascending. They are cut in runs of 256. A block adds up
// one run in order (SumRuns, or finalize.h on its way); codes of more than one run leave partial sums, which Fold adds
// in order. A code that has all the rows is thus spread over N / 256 blocks.
// Workspace: 16 bytes a row for the sort (and what the sort itself takes), D / 32 bytes a row for partial sums.
// Why a sort and not atomics: it is deterministic at the price of 40 bytes a row beside 4 D or more of x, and one hot
// code costs nothing. It has never run on a GPU; atomics may turn out faster and would then be the default.
#pragma once

#include "../numbers.h"
#include "block.h"
#include "memory.h"

namespace vqops::cuda {

constexpr int kRun = 256;

struct Run {
    int64_t code;        // of all heads: h K + k; H K for the rows that are left out
    int64_t begin, end;  // places in the sorted order
    int64_t slot;        // of its partial sum, for codes of several runs
    bool first, several;
};

struct Sorted {
    int64_t H, N, K;
    uint32_t *key = nullptr, *row = nullptr;     // [H N] as given, then
    uint32_t *keys = nullptr, *order = nullptr;  // [H N] sorted: keys ascending, rows (h N + n) ascending within a key
    uint32_t* start = nullptr;                   // [H K + 2] where each key begins
    uint32_t* several = nullptr;                 // [1 + H N / 257] how many codes have several runs, and which
    void* temporary = nullptr;                   // of the sort
    size_t temporary_bytes = 0;

    static Sorted take(Memory& memory, int64_t H, int64_t N, int64_t K, size_t temporary_bytes) {
        const int64_t rows = H * N;
        Sorted s{H, N, K};
        s.key = memory.take<uint32_t>(rows), s.row = memory.take<uint32_t>(rows);
        s.keys = memory.take<uint32_t>(rows), s.order = memory.take<uint32_t>(rows);
        s.start = memory.take<uint32_t>(H * K + 2);
        s.several = memory.take<uint32_t>(1 + rows / (kRun + 1));
        s.temporary = memory.take<char>(int64_t(temporary_bytes)), s.temporary_bytes = temporary_bytes;
        return s;
    }

    VQOPS_HOST_DEVICE int64_t rows() const { return H * N; }
    VQOPS_HOST_DEVICE int64_t codes() const { return H * K; }
    VQOPS_HOST_DEVICE int64_t slots() const { return H * N / (kRun / 2) + 1; }

    // Blocks that cover all runs. Code c owns the items from first_item(c) to first_item(c + 1): at least one, and
    // never fewer than its runs, since ceil(n / 256) <= floor((s + n) / 256) - floor(s / 256) + 1.
    VQOPS_HOST_DEVICE int64_t items() const { return first_item(codes() + 1, rows()); }
    VQOPS_HOST_DEVICE int64_t first_item(int64_t code, int64_t begins) const { return begins / kRun + code; }

    // False for an item that no run needs. The first item of a code is always one, also if the code has no rows.
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
        return run.first || run.begin < ends;
    }

    VQOPS_HOST_DEVICE int64_t count(int64_t code) const { return int64_t(start[code + 1]) - int64_t(start[code]); }
};

// A thread a row: its key.
struct Keys {
    static constexpr int kThreads = 256;
    struct Shared {};
    Sorted sorted;
    Indices indices;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (sorted.rows() + kThreads - 1) / kThreads; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.own([&](int t) {
            const int64_t i = block.index * kThreads + t;
            if (i >= sorted.rows()) return;
            const int64_t h = uint32_t(i) / uint32_t(sorted.N), k = indices.at(h, i - h * sorted.N);
            sorted.key[i] = uint32_t(k >= 0 ? h * sorted.K + k : sorted.codes());
            sorted.row[i] = uint32_t(i);
        });
    }
};

// A thread a code: where its rows begin, by bisection.
struct Starts {
    static constexpr int kThreads = 256;
    struct Shared {};
    Sorted sorted;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (sorted.codes() + 2 + kThreads - 1) / kThreads; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.own([&](int t) {
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

// Where the sums of a run go: to the code itself, or to a partial sum. Column D is the sum of the weights.
template <class T>
struct SumsOut {
    int64_t D, columns;  // D, or D + 1 with weights
    void* sums;          // [H K, D]
    DType dtype;         // of sums
    int64_t* counts;     // [H K]; null with weights, and where nobody counts
    float* weights;      // [H K]; null without
    T* partial;          // [slots, columns]

    template <class Block>
    VQOPS_HOST_DEVICE void write(const Block& block, const Sorted& sorted, const Run& run, int64_t column, T sum) const {
        if (run.code == sorted.codes()) return;
        if (column == 0 && run.first) {
            if (counts) counts[run.code] = sorted.count(run.code);
            if (run.several) sorted.several[1 + block.fetch_add(sorted.several, 1u)] = uint32_t(run.code);
        }
        if (run.several) partial[run.slot * columns + column] = sum;
        else whole(run.code, column, sum);
    }

    VQOPS_HOST_DEVICE void whole(int64_t code, int64_t column, T sum) const {
        if (column < D) write_value(sums, dtype, code * D + column, sum);
        else weights[code] = float(sum);
    }
};

// One block: 64 columns of one run, a thread a column. `value.at(row, h, n, run, column)` is what a row adds.
// Bytes: each row's columns once, 4 a row for its place; written: one row a run.
template <class Value, class T>
struct SumRuns {
    static constexpr int kThreads = 64;
    struct Shared {};
    Sorted sorted;
    SumsOut<T> out;
    Value value;

    size_t shared_bytes() const { return 0; }
    VQOPS_HOST_DEVICE uint32_t slices() const { return uint32_t((out.columns + kThreads - 1) / kThreads); }
    int64_t blocks() const { return sorted.items() * slices(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.own([&](int t) {
            const uint32_t item = uint32_t(block.index) / slices(), slice = uint32_t(block.index) % slices();
            const int64_t column = int64_t(slice) * kThreads + t;
            Run run;
            if (!sorted.run_of(item, run) || column >= out.columns || run.code == sorted.codes()) return;
            const int64_t h = uint32_t(run.code) / uint32_t(sorted.K);
            const auto code = value.code(h, run.code - h * sorted.K, column);
            T sum = 0;
            VQOPS_UNROLL(8)
            for (int64_t p = run.begin; p < run.end; p++) {
                const int64_t row = sorted.order[p];
                sum += value.at(row, h, row - h * sorted.N, column, code);
            }
            out.write(block, sorted, run, column, sum);
        });
    }
};

// One block: 32 columns of one code of several runs. Shared: 128 partial sums at a time, read by all threads, added in
// order by one thread a column.
template <class T>
struct Fold {
    static constexpr int kThreads = 256, kColumns = 32, kRows = 128;
    struct Shared {
        T tile[kRows][kColumns];
        T sum[kColumns];
    };
    Sorted sorted;
    SumsOut<T> out;

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t slices() const { return uint32_t((out.columns + kColumns - 1) / kColumns); }
    int64_t blocks() const { return sorted.rows() / (kRun + 1) * slices(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t number = uint32_t(block.index) / slices(), left = uint32_t(block.index) % slices() * kColumns;
        if (number >= sorted.several[0]) return;
        const int64_t code = sorted.several[1 + number];
        const int64_t slot = sorted.start[code] / (kRun / 2), runs = (sorted.count(code) + kRun - 1) / kRun;
        block.each([&](int t) {
            if (t < kColumns) shared.sum[t] = 0;
        });
        for (int64_t base = 0; base < runs; base += kRows) {
            const int rows = runs - base < kRows ? int(runs - base) : kRows;
            block.each([&](int t) {
                const int column = t % kColumns;
                VQOPS_UNROLL(16)
                for (int r = t / kColumns; r < rows; r += kThreads / kColumns)
                    if (left + column < out.columns)
                        shared.tile[r][column] = out.partial[(slot + base + r) * out.columns + left + column];
            });
            block.each([&](int t) {
                if (t >= kColumns || left + t >= out.columns) return;
                T sum = shared.sum[t];
                for (int r = 0; r < rows; r++) sum += shared.tile[r][t];
                shared.sum[t] = sum;
            });
        }
        block.own([&](int t) {
            if (t < kColumns && left + t < out.columns) out.whole(code, left + t, shared.sum[t]);
        });
    }
};

// Rows by code. `device.sort` sorts keys with their rows, stably.
template <class Device>
void sort_by_code(const Device& device, const Sorted& sorted, const Indices& indices) {
    device.launch(Keys{sorted, indices});
    device.sort(sorted);
    device.launch(Starts{sorted});
}

}  // namespace vqops::cuda
