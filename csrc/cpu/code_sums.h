// Sums of the rows that have each code, in an order that does not depend on threads.
//
// The rows of a code, ascending, are cut in runs of 256; a run is summed in order, then the runs in order. Each thread
// owns a range of codes, balanced by their counts, and scans all indices: 8 N bytes a thread, and x once in all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"

namespace vqops {

constexpr int64_t kRun = 256;

// int64 [H, N], by strides in elements.
struct Indices {
    const int64_t* data;
    int64_t head_stride, row_stride;

    int64_t at(int64_t h, int64_t n) const { return data[h * head_stride + n * row_stride]; }
};

// The indices of one head and how often each code occurs.
class CodeCounts {
public:
    // Returns the place of an index that is neither -1 nor a code, or -1.
    int64_t count(const Indices& indices, int64_t h, int64_t N, int64_t K) {
        indices_ = indices, h_ = h, N_ = N;
        counts_.assign(K, 0);
        for (int64_t n = 0; n < N; n++) {
            const int64_t k = indices.at(h, n);
            if (k < -1 || k >= K) return n;
            if (k >= 0) counts_[k]++;
        }
        return -1;
    }

    const std::vector<int64_t>& counts() const { return counts_; }

    // sums [K, D] = the sum of the rows of each code. `reader()` gives a thread its `row(n)`, a pointer to D values.
    template <class T, class Reader>
    void sum(int64_t D, T* sums, const Reader& reader, const Parallel& parallel) const {
        const int64_t K = int64_t(counts_.size()), threads = std::max(1, parallel.threads);
        std::vector<int64_t> bounds(threads + 1, K);
        bounds[0] = 0;
        int64_t total = 0, seen = 0;
        for (int64_t k = 0; k < K; k++) total += counts_[k] + 1;
        for (int64_t k = 0, t = 1; k < K && t < threads; k++) {
            seen += counts_[k] + 1;
            while (t < threads && seen * threads >= t * total) bounds[t++] = k + 1;
        }
        parallel.over(threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++) sum_range(bounds[t], bounds[t + 1], D, sums, reader);
        });
    }

private:
    // Codes of more than one run collect the current run beside the total.
    template <class T, class Reader>
    void sum_range(int64_t first, int64_t last, int64_t D, T* sums, const Reader& reader) const {
        if (first >= last) return;
        auto row = reader();
        std::fill(sums + first * D, sums + last * D, T(0));
        std::vector<int32_t> run_of(last - first, -1);
        std::vector<uint8_t> length(last - first, 0);  // of the current run, modulo 256
        int32_t long_codes = 0;
        for (int64_t k = first; k < last; k++)
            if (counts_[k] > kRun) run_of[k - first] = long_codes++;
        std::vector<T> runs(long_codes * D, T(0));
        for (int64_t n = 0; n < N_; n++) {
            const int64_t k = indices_.at(h_, n);
            if (k < first || k >= last) continue;
            const T* values = row(n);
            const int32_t slot = run_of[k - first];
            T* sum = slot < 0 ? sums + k * D : runs.data() + slot * D;
            for (int64_t i = 0; i < D; i++) sum[i] += values[i];
            if (++length[k - first] == 0 && slot >= 0) fold(sums + k * D, sum, D);
        }
        for (int64_t k = first; k < last; k++)
            if (run_of[k - first] >= 0) fold(sums + k * D, runs.data() + run_of[k - first] * D, D);
    }

    template <class T>
    static void fold(T* total, T* run, int64_t D) {
        for (int64_t i = 0; i < D; i++) total[i] += run[i], run[i] = 0;
    }

    Indices indices_ = {};
    int64_t h_ = 0, N_ = 0;
    std::vector<int64_t> counts_;
};

}  // namespace vqops
