// What follows the search: codes in place of rows, errors and, if asked, the sums for the EMA update, in one read of x.
//
// One block: up to 256 rows, by tiles of 32 rows and 64 columns. With sums the rows are a run of one code (runs.h),
// else neighbours in memory.
//   shared        a tile of x and of the codes; eight partial sums a row, in float64 (distance.h)
//   bytes         x read once (twice for cosine, the second time mostly from cache), quantized written once
// Phases of a tile: all threads load it and write the codes; eight threads a row add up the error; a thread a column
// adds up the sums, rows in order.
#pragma once

#include "../distance.h"
#include "runs.h"

namespace vqops::cuda {

template <class T>
struct ErrorOf {
    typedef float type;
};
template <>
struct ErrorOf<double> {
    typedef double type;
};

template <class T>
struct Finalize {
    typedef typename ErrorOf<T>::type Real;
    static constexpr int kThreads = 256, kTileRows = 32, kColumns = 64;
    static constexpr int kStride = kColumns + 8;  // eight threads a row, four rows a warp: 32 banks

    struct Shared {
        double code[kTileRows][kStride];
        Real x[kTileRows][kStride];
        double part[kRun][kLanes];
        double norm[kRun];
        double absent[kRun];       // what rows without a code get: 0 if masked, else NaN
        int64_t x_offset[kRun], code_offset[kRun];  // code_offset -1: no code
        uint32_t row[kRun];
        float weight[kRun];
    };

    int64_t H, N, D;
    Typed<T> x;       // [H, N, D]
    Rows codebook;    // [H, K, D]
    Rows weight;      // [H, N]; data null without
    Indices indices;  // [H, N]
    RowMask mask;
    bool cosine, with_sums;
    T* quantized;  // [H, N, D]
    Real* error;   // [H, N]
    Sorted sorted;               // with sums
    SumsOut<float> out;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return with_sums ? sorted.items() : (H * N + kRun - 1) / kRun; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        Run run = {-1, block.index * kRun, block.index * kRun + kRun, 0, false, false};
        if (with_sums && !sorted.run_of(block.index, run)) return;
        if (run.end > H * N) run.end = H * N;
        const int rows = int(run.end - run.begin);
        block.each([&](int t) {
            if (t >= rows) return;
            const int64_t row = with_sums ? sorted.order[run.begin + t] : run.begin + t;
            const int64_t h = uint32_t(row) / uint32_t(N), n = row - h * N;
            const int64_t k = indices.at(h, n);
            shared.row[t] = uint32_t(row);
            shared.x_offset[t] = x.offset(h, n);
            shared.code_offset[t] = k < 0 ? -1 : codebook.offset(h, k);
            shared.absent[t] = mask.keeps(h, n) ? NAN : 0.0;
            shared.weight[t] = weight.data ? float(weight.at(weight.offset(h, n), 0)) : 1;
            shared.norm[t] = 1;
            for (int j = 0; j < kLanes; j++) shared.part[t][j] = 0;
        });
        if (cosine) norms(block, shared, rows);
        for (int64_t left = 0; left < D; left += kColumns) {
            auto sums = block.template registers<float>();
            block.own([&](int t) { sums[t] = 0; });
            for (int top = 0; top < rows; top += kTileRows) {
                load(block, shared, top, rows, left);
                block.each([&](int t) { add_errors(shared, t, top, rows, left); });
                if (with_sums) block.each([&](int t) { sums[t] = add_rows(shared, t, top, rows, left, sums[t]); });
            }
            block.own([&](int t) {
                if (with_sums && t < kColumns && left + t < D) out.write(block, sorted, run, left + t, sums[t]);
            });
        }
        block.own([&](int t) {
            if (t < rows) error[shared.row[t]] = Real(shared.code_offset[t] < 0 ? shared.absent[t] : tree(shared.part[t]));
            if (t != 0 || !with_sums || out.columns == D) return;
            float sum = 0;
            for (int r = 0; r < rows; r++) sum += shared.weight[r];
            out.write(block, sorted, run, D, sum);
        });
    }

private:
    // |x| by rows, at least 1e-6; leaves the partial sums at 0.
    template <class Block>
    VQOPS_HOST_DEVICE void norms(Block& block, Shared& shared, int rows) const {
        block.each([&](int t) {
            for (int r = t / kLanes; r < rows; r += kThreads / kLanes) {
                double sum = 0;
                for (int64_t i = t % kLanes; i < D; i += kLanes) {
                    const double value = x.at(shared.x_offset[r], i);
                    sum = add_product(sum, value, value);
                }
                shared.part[r][t % kLanes] = sum;
            }
        });
        block.each([&](int t) {
            if (t >= rows) return;
            shared.norm[t] = divisor(tree(shared.part[t]));
            for (int j = 0; j < kLanes; j++) shared.part[t][j] = 0;
        });
    }

    template <class Block>
    VQOPS_HOST_DEVICE void load(Block& block, Shared& shared, int top, int rows, int64_t left) const {
        block.each([&](int t) {
            const int column = t % kColumns;
            const int64_t i = left + column;
            VQOPS_UNROLL(8)
            for (int r = t / kColumns; r < kTileRows; r += kThreads / kColumns) {
                if (top + r >= rows || i >= D) continue;
                const int64_t from = shared.code_offset[top + r];
                shared.x[r][column] = Real(x.at(shared.x_offset[top + r], i));
                const double code = from < 0 ? shared.absent[top + r] : codebook.at(from, i);
                shared.code[r][column] = code;
                quantized[int64_t(shared.row[top + r]) * D + i] = rounded<T>(code);
            }
        });
    }

    // Partial sum t mod 8 of row top + t / 8; for cosine, x becomes its unit, in float32 as the sums take it.
    VQOPS_HOST_DEVICE void add_errors(Shared& shared, int t, int top, int rows, int64_t left) const {
        const int r = t / kLanes;
        if (top + r >= rows) return;
        double sum = shared.part[top + r][t % kLanes];
        for (int column = t % kLanes; column < kColumns && left + column < D; column += kLanes) {
            double start = shared.x[r][column];
            if (cosine) {
                start /= shared.norm[top + r];
                shared.x[r][column] = float(start);
            }
            sum = add_square(sum, start, shared.code[r][column]);
        }
        shared.part[top + r][t % kLanes] = sum;
    }

    VQOPS_HOST_DEVICE float add_rows(const Shared& shared, int t, int top, int rows, int64_t left, float sum) const {
        if (t >= kColumns || left + t >= D) return 0;
        const int last = rows - top < kTileRows ? rows - top : kTileRows;
        for (int r = 0; r < last; r++) {
            const float value = float(shared.x[r][t]);
            sum += weight.data ? value * shared.weight[top + r] : value;
        }
        return sum;
    }
};

template <class Device, class T>
void finalize(const Device& device, const Finalize<T>& kernel) {
    if (kernel.with_sums) sort_by_code(device, kernel.sorted, kernel.indices);
    device.launch(kernel);
    if (kernel.with_sums) device.launch(Fold<float>{kernel.sorted, kernel.out});
}

}  // namespace vqops::cuda
