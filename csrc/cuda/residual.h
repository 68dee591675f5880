// Residual quantization: after the search of each level one pass takes the codes off the rows, in one read and write of
// what is left of them.
//
// TakeOff: eight neighbouring threads per row, which take a partial sum of the error each (distance.h).
//   bytes         per row and element: what is left and the sum of the codes read and written, the code from L2; 8 per
//                 row for the index, 8 for the error
// What is left of a row is read once for units too: the pass that writes it adds up its square for the next level.
// How many levels run is read on the device: kernels of the others write index -1 and error 0, and their rows are
// masked for the search.
#pragma once

#include "../contract.h"
#include "../distance.h"
#include "code_sums.h"
#include "gather.h"

namespace vqops::cuda {

// The first levels, which run.
struct Running {
    const int64_t* levels;  // null: all

    VQOPS_HOST_DEVICE bool has(int64_t level) const { return !levels || level < *levels; }
};

// What a level leaves beside the rows, for the next one; null where nobody asks.
struct NextLevel {
    double* square;  // [H, N], |r|^2
    bool* kept;      // [H, N], rows that are not masked, of a level that runs
};

// The rows of a block, eight threads for each.
struct EightPerRow {
    static constexpr int kThreads = 256, kRows = kThreads / kLanes;
    int64_t H, N;

    int64_t blocks() const { return (H * N + kRows - 1) / kRows; }
    VQOPS_HOST_DEVICE int64_t row(int64_t block, int t) const { return block * kRows + t / kLanes; }
    VQOPS_HOST_DEVICE bool has(int64_t row) const { return row < H * N; }
    VQOPS_HOST_DEVICE int64_t head(int64_t row) const { return uint32_t(row) / uint32_t(N); }
};

// Of x, before the first level.
template <class T>
struct FirstLevel {
    static constexpr int kThreads = EightPerRow::kThreads;
    struct Shared {};
    EightPerRow rows;
    int64_t D;
    Typed<T> x;  // [H, N, D]
    RowMask mask;
    Running running;
    NextLevel next;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return rows.blocks(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        auto square = block.template registers<double>();
        block.for_threads([&](int t) {
            const int64_t row = rows.row(block.index, t), h = rows.has(row) ? rows.head(row) : 0;
            const int64_t from = x.offset(h, row - h * rows.N);
            double sum = 0;
            for (int64_t i = t % kLanes; i < D && rows.has(row) && next.square; i += kLanes) {
                const double value = x.at(from, i);
                sum = add_product(sum, value, value);
            }
            square[t] = sum;
        });
        block.template shuffle_sum<kLanes>(square);
        block.for_threads([&](int t) {
            const int64_t row = rows.row(block.index, t);
            if (t % kLanes != 0 || !rows.has(row)) return;
            const int64_t h = rows.head(row);
            if (next.square) next.square[row] = square[t];
            if (next.kept) next.kept[row] = running.has(0) && mask.keeps(h, row - h * rows.N);
        });
    }
};

template <class T>
struct TakeOff {
    typedef typename ErrorOf<T>::type Real;
    static constexpr int kThreads = EightPerRow::kThreads, kReads = 4;
    struct Shared {};
    EightPerRow rows;
    int64_t D, Q, level;
    Typed<T> x;      // [H, N, D], what the first level takes
    Rows codebook;   // [H, K, D]
    Indices chosen;  // [H, N]
    RowMask mask;
    Running running;
    Real* rest;  // [H, N, D], of the levels before; what the last one leaves is not written
    // Null where nobody asks:
    Real* total;       // [H, N, D], the codes of the levels before
    T* quantized;      // [H, N, D], by the last level
    int64_t* indices;  // [H, N, Q]
    double* error;     // [H, Q, N]
    NextLevel next;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return rows.blocks(); }
    VQOPS_HOST_DEVICE bool last() const { return level == Q - 1; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        const bool runs = running.has(level);
        auto sums = block.template registers<Doubles<2>>();  // |y - c|^2, and |r|^2 of the next level
        auto codes = block.template registers<int64_t>();
        block.for_threads([&](int t) {
            sums[t].v[0] = sums[t].v[1] = 0, codes[t] = -1;
            const int64_t row = rows.row(block.index, t);
            if (!rows.has(row)) return;
            const int64_t h = rows.head(row), n = row - h * rows.N;
            codes[t] = runs ? chosen.at(h, n) : -1;
            const double absent = runs && mask.keeps(h, n) ? NAN : 0.0;
            if (runs || level == 0 || last()) step(t, row, h, codes[t], absent, sums[t].v);
            if (codes[t] < 0) sums[t].v[0] = absent;
        });
        block.template shuffle_sum<kLanes>(sums);
        block.for_threads([&](int t) {
            const int64_t row = rows.row(block.index, t);
            if (t % kLanes != 0 || !rows.has(row)) return;
            const int64_t h = rows.head(row), n = row - h * rows.N;
            if (indices) indices[row * Q + level] = codes[t];
            if (error) error[(h * Q + level) * rows.N + n] = sums[t].v[0];
            if (next.square) next.square[row] = sums[t].v[1];
            if (next.kept) next.kept[row] = running.has(level + 1) && mask.keeps(h, n);
        });
    }

private:
    // A thread's columns. All reads are under way before one is waited for; columns behind the last read the first.
    VQOPS_HOST_DEVICE void step(int t, int64_t row, int64_t h, int64_t code, double absent, double* sums) const {
        const int lane = t % kLanes;
        const int64_t from = x.offset(h, row - h * rows.N), place = row * D;
        const int64_t of_code = codebook.offset(h, code < 0 ? 0 : code);
        const double norm = next.square ? divisor(next.square[row]) : 1;
        for (int64_t base = lane; base < D; base += kLanes * kReads) {
            const auto column = [&](int j) { return base + j * kLanes < D ? base + j * kLanes : lane; };
            Real before[kReads], sum[kReads];
            double taken[kReads];
            VQOPS_UNROLL(4)
            for (int j = 0; j < kReads; j++) {
                before[j] = level == 0 ? Real(x.at(from, column(j))) : rest[place + column(j)];
                sum[j] = level == 0 || !total ? Real(0) : total[place + column(j)];
            }
            codebook.with_type([&](const auto* values) {
                VQOPS_UNROLL(4)
                for (int j = 0; j < kReads; j++) taken[j] = real(values[of_code + column(j) * codebook.stride]);
            });
            VQOPS_UNROLL(4)
            for (int j = 0; j < kReads; j++) {
                const int64_t i = base + j * kLanes;
                if (i >= D) break;
                const double c = code < 0 ? absent : taken[j];
                const double start = next.square ? double(before[j]) / norm : double(before[j]);
                sums[0] = add_square(sums[0], start, c);
                sum[j] += Real(c);
                if (last()) {
                    if (quantized) quantized[place + i] = rounded<T>(sum[j]);
                    continue;
                }
                const Real after = Real(double(before[j]) - c);
                sums[1] = add_product(sums[1], after, after);
                rest[place + i] = after;
                if (total) total[place + i] = sum[j];
            }
        }
    }
};

// One block: some neighbouring values of a group, added in their order by one thread.
struct AddInOrder {
    static constexpr int kThreads = 256;
    struct Shared {
        double value[kThreads];
    };
    const double* values;  // [groups, length]
    int64_t groups, length;
    int64_t run, runs;  // values of a block, and blocks of a group
    void* sums;         // [groups, runs]
    DType dtype;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return groups * runs; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t group = uint32_t(block.index) / uint32_t(runs), first = (block.index - group * runs) * run;
        const int64_t end = first + run < length ? first + run : length;
        const double* const own = values + group * length;
        auto sum = block.template registers<double>();
        block.for_threads([&](int t) { sum[t] = 0; });
        for (int64_t base = first; base < end; base += kThreads) {
            const int count = end - base < kThreads ? int(end - base) : kThreads;
            block.for_threads_sync([&](int t) {
                if (t < count) shared.value[t] = own[base + t];
            });
            block.for_threads_sync([&](int t) {
                if (t != 0) return;
                VQOPS_UNROLL(8)
                for (int i = 0; i < count; i++) sum[t] += shared.value[i];
            });
        }
        block.for_threads([&](int t) {
            if (t == 0) write_value(sums, dtype, block.index, sum[t]);
        });
    }
};

constexpr int64_t runs_of(int64_t N) { return (N + kRun - 1) / kRun; }

// The sums of rows [groups, N], in runs of 256 and then the runs; `partial` is workspace [groups, runs_of(N)].
template <class Device>
void add_errors(const Device& device, const double* errors, int64_t groups, int64_t N, double* partial, void* sums,
                DType dtype) {
    device.launch(AddInOrder{errors, groups, N, kRun, runs_of(N), partial, DType::float64});
    device.launch(AddInOrder{partial, groups, runs_of(N), runs_of(N), 1, sums, dtype});
}

// What code_sums adds of a row that is divided by its length.
template <class T>
struct UnitRow {
    struct Row {
        int64_t x;
        double norm;
    };
    Typed<T> x;            // [H, N, D]
    const double* square;  // [H, N], |x|^2

    VQOPS_HOST_DEVICE Row row(int64_t row, int64_t h, int64_t n, int64_t) const {
        return {x.offset(h, n), divisor(square[row])};
    }
    VQOPS_HOST_DEVICE void read(const Row* rows, int64_t column, float* values) const {
        VQOPS_UNROLL(8)
        for (int j = 0; j < kAhead; j++) values[j] = float(double(x.at(rows[j].x, column)) / rows[j].norm);
    }
};

// counts and sums of what a level quantizes; `square` null: as given.
template <class Device, class T>
void sum_level(const Device& device, const Typed<T>& x, const double* square, const Sums<float>& sums) {
    if (square) sum_rows(device, sums, UnitRow<T>{x, square});
    else code_sums(device, x, Rows{}, sums);
}

}  // namespace vqops::cuda
