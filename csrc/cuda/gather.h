// After the search: codes in place of rows, errors and, if asked, the sums for the EMA update, in one read of x.
//
// One block: up to 256 rows, by tiles of 32 rows and 64 columns. The rows are neighbours in memory; with sums they are
// taken in the order of their codes, or are a run of one code (code_sums.h).
//   shared        a tile of x and of the codes; eight partial sums per row, in float64 (distance.h)
//   bytes         x read once (twice for units, the second time mostly from cache), quantized written once, and
//                 what the sums take (code_sums.h)
// Phases of a tile: all threads load it and write the codes; eight threads per row add up the error; one thread per
// column adds up the sums, rows in order. The sizes are guesses.
#pragma once

#include "../distance.h"
#include "code_sums.h"

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
struct GatherInputs {
    typedef typename ErrorOf<T>::type Real;
    int64_t D;
    Typed<T> x;     // [H, N, D]
    Rows codebook;  // [H, K, D]
    Rows weight;    // [H, N]; data null without
    RowMask mask;
    bool units;        // errors and sums of x / max(|x|, 1e-6)
    T* quantized;      // [H, N, D]
    Real* error;       // [H, N]
    Sums<float> sums;  // by_code alone where nobody asks for sums
};

template <class T, Order order>
struct Gather {
    typedef typename ErrorOf<T>::type Real;
    static constexpr bool kSums = order != Order::memory;
    static constexpr int kThreads = 256, kTileRows = 32, kColumns = 64;
    static constexpr int kStride = kColumns + 8;  // eight threads per row, four rows per warp: 32 banks

    struct Shared {
        Batch batch;
        union {
            BatchScratch scratch;
            double code[kTileRows][kStride];
        };
        Real x[kTileRows][kStride];
        double part[kRun][kLanes];
        double norm[kRun];
        double absent[kRun];       // of rows without a code: 0 if masked, else NaN
        int64_t x_offset[kRun], code_offset[kRun];  // code_offset -1: no code
        float weight[kRun];
    };

    GatherInputs<T> in;

    size_t shared_bytes() const { return sizeof(Shared); }
    int64_t blocks() const { return in.sums.by_code.template batches<order>(); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const RowsByCode& by_code = in.sums.by_code;
        const int64_t D = in.D;
        const Batch& batch = shared.batch;
        Run run = {};
        const int rows = take_batch<order, kThreads>(block, shared.batch, shared.scratch, by_code, block.index, run);
        if (!rows) return;
        if (kSums) in.sums.template count<order, kThreads>(block, batch, rows, run);
        block.for_threads_sync([&](int t) {
            if (t >= rows) return;
            const int64_t row = batch.row[t], h = uint32_t(row) / uint32_t(by_code.N), n = row - h * by_code.N;
            const bool lost = batch.code[t] == by_code.codes();
            shared.x_offset[t] = in.x.offset(h, n);
            shared.code_offset[t] = lost ? -1 : in.codebook.offset(h, batch.code[t] - h * by_code.K);
            shared.absent[t] = in.mask.keeps(h, n) ? NAN : 0.0;
            shared.weight[t] = in.weight.data ? float(in.weight.at(in.weight.offset(h, n), 0)) : 1;
            shared.norm[t] = 1;
            for (int j = 0; j < kLanes; j++) shared.part[t][j] = 0;
        });
        if (in.units) norms(block, shared, rows);
        for (int64_t left = 0; left < D; left += kColumns) {
            auto sum = block.template registers<float>();
            block.for_threads([&](int t) { sum[t] = 0; });
            for (int top = 0; top < rows; top += kTileRows) {
                load(block, shared, top, rows, left);
                block.for_threads_sync([&](int t) { add_errors(shared, t, top, rows, left); });
                if (!kSums) continue;
                const int last = rows - top < kTileRows ? whole_reads(rows) : top + kTileRows;
                block.for_threads_sync([&](int t) {
                    if (t >= kColumns || left + t >= D) return;
                    sum[t] = add_rows(
                        batch, top, last, sum[t],
                        [&](int base, float* values) {
                            VQOPS_UNROLL(8)
                            for (int j = 0; j < kAhead; j++)
                                values[j] = float(shared.x[base - top + j][t]) * shared.weight[base + j];
                        },
                        [&](uint32_t code, float all) {
                            in.sums.template give<order>(block, run, code, left + t, all);
                        });
                });
            }
        }
        block.for_threads([&](int t) {
            const bool lost = t < rows && shared.code_offset[t] < 0;
            if (t < rows) in.error[batch.row[t]] = Real(lost ? shared.absent[t] : tree(shared.part[t]));
            if (t != 0 || !kSums || in.sums.columns == D) return;
            add_rows(
                batch, 0, whole_reads(rows), 0.0f,
                [&](int base, float* values) {
                    VQOPS_UNROLL(8)
                    for (int j = 0; j < kAhead; j++) values[j] = shared.weight[base + j];
                },
                [&](uint32_t code, float all) { in.sums.template give<order>(block, run, code, D, all); });
        });
    }

private:
    // |x| by rows, at least 1e-6; leaves the partial sums at 0.
    template <class Block>
    VQOPS_HOST_DEVICE void norms(Block& block, Shared& shared, int rows) const {
        block.for_threads_sync([&](int t) {
            for (int r = t / kLanes; r < rows; r += kThreads / kLanes) {
                double sum = 0;
                for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                    const double value = in.x.at(shared.x_offset[r], i);
                    sum = add_product(sum, value, value);
                }
                shared.part[r][t % kLanes] = sum;
            }
        });
        block.for_threads_sync([&](int t) {
            if (t >= rows) return;
            shared.norm[t] = divisor(tree(shared.part[t]));
            for (int j = 0; j < kLanes; j++) shared.part[t][j] = 0;
        });
    }

    // All reads are under way before one is waited for; rows behind the last one read it again.
    template <class Block>
    VQOPS_HOST_DEVICE void load(Block& block, Shared& shared, int top, int rows, int64_t left) const {
        constexpr int kStep = kThreads / kColumns, kReads = kTileRows / kStep;
        block.for_threads_sync([&](int t) {
            const int column = t % kColumns, first = t / kColumns;
            const int64_t i = left + column;
            if (i >= in.D) return;
            const auto place = [&](int j) {
                const int p = top + first + j * kStep;
                return p < rows ? p : rows - 1;
            };
            Real values[kReads];
            double codes[kReads];
            VQOPS_UNROLL(8)
            for (int j = 0; j < kReads; j++) values[j] = Real(in.x.at(shared.x_offset[place(j)], i));
            in.codebook.with_type([&](const auto* codebook) {
                VQOPS_UNROLL(8)
                for (int j = 0; j < kReads; j++) {
                    const int64_t from = shared.code_offset[place(j)];
                    const double code = real(codebook[(from < 0 ? 0 : from) + i * in.codebook.stride]);
                    codes[j] = from < 0 ? shared.absent[place(j)] : code;
                }
            });
            VQOPS_UNROLL(8)
            for (int j = 0; j < kReads; j++) {
                const int r = first + j * kStep;
                if (top + r >= rows) continue;
                shared.x[r][column] = values[j];
                shared.code[r][column] = codes[j];
                in.quantized[int64_t(shared.batch.row[top + r]) * in.D + i] = rounded<T>(codes[j]);
            }
        });
    }

    // Partial sum t mod 8 of row top + t / 8; with units, x becomes its own, in float32 as the sums take it.
    VQOPS_HOST_DEVICE void add_errors(Shared& shared, int t, int top, int rows, int64_t left) const {
        const int r = t / kLanes;
        if (top + r >= rows) return;
        double sum = shared.part[top + r][t % kLanes];
        for (int column = t % kLanes; column < kColumns && left + column < in.D; column += kLanes) {
            double start = shared.x[r][column];
            if (in.units) {
                start /= shared.norm[top + r];
                shared.x[r][column] = float(start);
            }
            sum = add_square(sum, start, shared.code[r][column]);
        }
        shared.part[top + r][t % kLanes] = sum;
    }
};

template <class Device, class T>
void gather(const Device& device, const GatherInputs<T>& in, bool with_sums) {
    if (!with_sums) return device.launch(Gather<T, Order::memory>{in});
    sum_by_code(device, in.sums, Gather<T, Order::sorted>{in}, Gather<T, Order::within_block>{in});
}

}  // namespace vqops::cuda
