// Sums by code, in one of two orders.
//
// By default a block takes 256 neighbouring rows, orders them by code in shared memory (batch.h), adds up those of each
// code in order, and adds the sum to the code's by an atomic operation: one per column, code and block, so that rows
// that share a code wait for each other once per block and not once per row. Between blocks the order is open, and so
// are the last bits; atomic additions of float32 take what is below 2^-126 for 0. Nothing is sorted in memory; there is
// no workspace.
// Bytes: the values once, 8 per row of indices; 4 D of atomic additions per code of a block, at most 4 D per row.
// Under torch.use_deterministic_algorithms(True) the rows are sorted by code (runs.h), a block takes a run of one code,
// and the order is the reference's.
// In both a block adds up the same way; only where its rows come from and its sums go differs.
#pragma once

#include "batch.h"

namespace vqops::cuda {

// Destination of the sums: the code itself, or a partial sum. Column D is the sum of the weights.
template <class T>
struct Sums {
    RowsByCode by_code;
    int64_t D, columns;  // D, or D + 1 with weights
    void* sums;          // [H K, D]
    DType dtype;         // of sums; T's own where they are added to by atomic operations
    Count* counts;       // [H K]; null with weights, and where nobody counts
    float* weights;      // [H K]; null without
    T* partial;          // [slots, columns], for the sorted order

    // Once per batch, by all threads. Without a sorted order the last row of a code adds its place, and the first one
    // takes its own off again.
    template <Order order, int kThreads, class Block>
    VQOPS_HOST_DEVICE void count(const Block& block, const Batch& batch, int rows, const Run& run) const {
        block.for_threads([&](int t) {
            if constexpr (order == Order::sorted) {
                if (t != 0 || !run.first || run.code == by_code.codes()) return;
                if (counts) counts[run.code] = Count(by_code.count(run.code));
                if (run.several) by_code.several[1 + block.atomic_add(by_code.several, 1u)] = uint32_t(run.code);
            } else {
                for (int p = t; p < rows && counts; p += kThreads) {
                    const uint32_t code = batch.code[p];
                    const int on = batch.ends(p) ? p + 1 : 0, off = p && batch.ends(p - 1) ? p : 0;
                    if (on != off && code != by_code.codes()) block.atomic_add(counts + code, Count(on) - Count(off));
                }
            }
        });
    }

    // The sum of the rows of a code in one batch.
    template <Order order, class Block>
    VQOPS_HOST_DEVICE void give(const Block& block, const Run& run, uint32_t code, int64_t column, T sum) const {
        if (code >= uint32_t(by_code.codes())) return;
        if (order != Order::sorted) {
            if (column < D) block.atomic_add(static_cast<T*>(sums) + uint64_t(code) * uint32_t(D) + column, sum);
            else block.atomic_add(weights + code, float(sum));
        } else if (run.several) {
            partial[run.slot * columns + column] = sum;
        } else {
            whole(code, column, sum);
        }
    }

    VQOPS_HOST_DEVICE void whole(int64_t code, int64_t column, T sum) const {
        if (column < D) write_value(sums, dtype, code * D + column, sum);
        else weights[code] = float(sum);
    }
};

// One block: 64 columns of one batch, one thread per column. `value.row(row, h, n, k)` is what the columns of a row
// share, computed once; `value.read(rows, column, values)` says what eight of them add to a column.
// Shared: the batch, 6 to 10 KB. Blocks are small so that many of them wait for memory at a time.
template <class Value, class T, Order order>
struct SumRows {
    static constexpr int kThreads = 64;
    struct Shared {
        Batch batch;
        union {
            BatchScratch scratch;
            typename Value::Row rows[kRun];
        };
    };
    Sums<T> sums;
    Value value;

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t slices() const { return uint32_t((sums.columns + kThreads - 1) / kThreads); }
    int64_t blocks() const { return sums.by_code.template batches<order>() * slices(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const uint32_t item = uint32_t(block.index) / slices(), slice = uint32_t(block.index) % slices();
        const RowsByCode& by_code = sums.by_code;
        const Batch& batch = shared.batch;
        Run run = {};
        const int rows = take_batch<order, kThreads>(block, shared.batch, shared.scratch, by_code, item, run);
        if (!rows) return;
        if (slice == 0) sums.template count<order, kThreads>(block, batch, rows, run);
        block.for_threads_sync([&](int t) {
            for (int p = t; p < whole_reads(rows); p += kThreads) {
                const int64_t row = batch.row[p < rows ? p : 0], h = uint32_t(row) / uint32_t(by_code.N);
                const bool counts = batch.code[p] < by_code.codes();  // or its sum goes nowhere
                shared.rows[p] = value.row(row, h, row - h * by_code.N, counts ? batch.code[p] - h * by_code.K : 0);
            }
        });
        block.for_threads([&](int t) {
            const int64_t column = int64_t(slice) * kThreads + t;
            if (column >= sums.columns) return;
            add_rows(
                batch, 0, whole_reads(rows), T(0),
                [&](int base, T* values) { value.read(shared.rows + base, column, values); },
                [&](uint32_t code, T sum) { sums.template give<order>(block, run, code, column, sum); });
        });
    }
};

// One block: 32 columns of one code of several runs. Shared: 128 partial sums at a time, read by all threads, added in
// order by one thread per column.
template <class T>
struct Fold {
    static constexpr int kThreads = 256, kColumns = 32, kRows = 128;
    struct Shared {
        T tile[kRows][kColumns];
        T sum[kColumns];
    };
    Sums<T> sums;

    size_t shared_bytes() const { return sizeof(Shared); }
    VQOPS_HOST_DEVICE uint32_t slices() const { return uint32_t((sums.columns + kColumns - 1) / kColumns); }
    int64_t blocks() const { return sums.by_code.rows() / (kRun + 1) * slices(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const RowsByCode& by_code = sums.by_code;
        const int64_t number = uint32_t(block.index) / slices(), left = uint32_t(block.index) % slices() * kColumns;
        if (number >= by_code.several[0]) return;
        const int64_t code = by_code.several[1 + number];
        const int64_t slot = by_code.start[code] / (kRun / 2), runs = (by_code.count(code) + kRun - 1) / kRun;
        block.for_threads_sync([&](int t) {
            if (t < kColumns) shared.sum[t] = 0;
        });
        for (int64_t base = 0; base < runs; base += kRows) {
            const int rows = runs - base < kRows ? int(runs - base) : kRows;
            block.for_threads_sync([&](int t) {
                const int column = t % kColumns;
                VQOPS_UNROLL(16)
                for (int r = t / kColumns; r < rows; r += kThreads / kColumns)
                    if (left + column < sums.columns)
                        shared.tile[r][column] = sums.partial[(slot + base + r) * sums.columns + left + column];
            });
            block.for_threads_sync([&](int t) {
                if (t >= kColumns || left + t >= sums.columns) return;
                T sum = shared.sum[t];
                for (int r = 0; r < rows; r++) sum += shared.tile[r][t];
                shared.sum[t] = sum;
            });
        }
        block.for_threads([&](int t) {
            if (t < kColumns && left + t < sums.columns) sums.whole(code, left + t, shared.sum[t]);
        });
    }
};

// By a kernel of either order, which gives the sums of its batches. Codes without rows stay at 0.
template <class Device, class T, class Sorted, class WithinBlock>
void sum_by_code(const Device& device, const Sums<T>& sums, const Sorted& sorted, const WithinBlock& within_block) {
    const int64_t codes = sums.by_code.codes();
    device.fill(sums.sums, 0, codes * sums.D * bytes_of(sums.dtype));
    if (sums.counts) device.fill(sums.counts, 0, codes * int64_t(sizeof(Count)));
    if (sums.weights) device.fill(sums.weights, 0, codes * int64_t(sizeof(float)));
    if (!sums.by_code.sorted()) return device.launch(within_block);
    sort_by_code(device, sums.by_code);
    device.launch(sorted);
    device.launch(Fold<T>{sums});
}

template <class Device, class Value, class T>
void sum_rows(const Device& device, const Sums<T>& sums, const Value& value) {
    sum_by_code(device, sums, SumRows<Value, T, Order::sorted>{sums, value},
                SumRows<Value, T, Order::within_block>{sums, value});
}

// A row's share of the sums of its code, for code_sums. Bytes: 4 D N read (float32), and what the sums take.
template <class T>
struct WeightedRow {
    struct alignas(16) Row {
        int64_t x;
        float weight;
    };
    Typed<T> x;   // [H, N, D]
    Rows weight;  // [H, N]; data null without
    int64_t D;

    VQOPS_HOST_DEVICE Row row(int64_t, int64_t h, int64_t n, int64_t) const {
        return {x.offset(h, n), weight.data ? float(weight.at(weight.offset(h, n), 0)) : 1};
    }
    VQOPS_HOST_DEVICE void read(const Row* rows, int64_t column, float* values) const {
        const T* const data = x.data + (column < D ? column : 0) * x.stride;
        VQOPS_UNROLL(8)
        for (int j = 0; j < kAhead; j++) {
            const float value = float(real(data[rows[j].x]));
            values[j] = (column < D ? value : 1) * rows[j].weight;
        }
    }
};

template <class Device, class T>
void code_sums(const Device& device, const Typed<T>& x, const Rows& weight, const Sums<float>& sums) {
    sum_rows(device, sums, WeightedRow<T>{x, weight, sums.D});
}

}  // namespace vqops::cuda
