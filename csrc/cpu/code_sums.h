// Sums of the rows that have each code, in an order that does not depend on threads.
//
// The rows of a code, ascending, are cut in runs of 256; a run is summed in order, then the runs in order. Each thread
// owns a range of codes, balanced by their counts, and scans all indices: 8 N bytes per thread, and x once in all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../contract.h"
#include "instructions.h"
#include "search.h"

namespace vqops {

// The indices of one head and how often each code occurs.
class CodeCounts {
public:
    // Fills counts [K], which must stay. Returns the place of an index that is neither -1 nor a code, or -1.
    int64_t count(const Indices& indices, int64_t h, int64_t N, int64_t* counts) {
        indices_ = indices, h_ = h, N_ = N, counts_ = counts;
        std::fill(counts, counts + indices.K, 0);
        int64_t most = 0;
        for (int64_t n = 0; n < N; n++) {
            const int64_t k = indices.given(h, n);
            if (k < -1 || k >= indices.K) return n;
            if (k >= 0) most = std::max(most, ++counts[k]);
        }
        most_ = most;
        return -1;
    }

    // sums [K, D] = the sum of the rows of each code. `reader()` gives a thread its `row(n)`, a pointer to D values.
    template <class T, class Reader>
    void sum(int64_t D, T* sums, const Reader& reader, const Parallel& parallel) const {
        over_ranges(parallel, [&](int64_t first, int64_t last) {
            Runs<T> runs(*this, first, last, D, sums);
            auto row = reader();
            for (int64_t n = 0; n < N_; n++) {
                const int64_t k = indices_.given(h_, n);
                if (k < first || k >= last) continue;
                const T* values = row(n);
                T* sum = runs.target.empty() ? runs.sums + (k - first) * D : runs.target[k - first];
                for (int64_t i = 0; i < D; i++) sum[i] += values[i];
                if (!runs.target.empty() && ++runs.length[k - first] == 0) runs.fold(k - first);
            }
            runs.finish();
        });
    }

    // The same of float rows side by side.
    void sum(int64_t D, float* sums, const float* rows, int64_t row_stride, const Parallel& parallel) const {
        over_ranges(parallel, [&](int64_t first, int64_t last) {
            Runs<float> runs(*this, first, last, D, sums);
            const auto fold = [](void* self, int64_t code) { static_cast<Runs<float>*>(self)->fold(code); };
            instructions().add_rows({indices_.data + h_ * indices_.head_stride, indices_.row_stride, rows, row_stride,
                                     N_, D, first, last - first, runs.sums,
                                     runs.target.empty() ? nullptr : runs.target.data(), runs.length.data(),
                                     &runs, fold});
            runs.finish();
        });
    }

private:
    // Calls body(first, last) on ranges of codes with about as many rows each, one thread per range.
    template <class Body>
    void over_ranges(const Parallel& parallel, const Body& body) const {
        const int64_t K = indices_.K, threads = parallel.threads;
        if (threads <= 1) return body(0, K);
        std::vector<int64_t> bounds(threads + 1, K);
        bounds[0] = 0;
        int64_t total = 0, seen = 0;
        for (int64_t k = 0; k < K; k++) total += counts_[k] + 1;
        for (int64_t k = 0, t = 1; k < K && t < threads; k++) {
            seen += counts_[k] + 1;
            while (t < threads && seen * threads >= t * total) bounds[t++] = k + 1;
        }
        parallel.over(threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; t++)
                if (bounds[t] < bounds[t + 1]) body(bounds[t], bounds[t + 1]);
        });
    }

    // Sums in the making of a range of codes. Where one has more than a run, each has a target: that code's current run,
    // kept beside its total, and the total itself of all others. Without one there are no lists.
    template <class T>
    struct Runs {
        Runs(const CodeCounts& codes, int64_t first, int64_t last, int64_t D, T* all) : sums(all + first * D), D_(D) {
            std::fill(sums, sums + (last - first) * D, T(0));
            if (codes.most_ <= kRun) return;
            int64_t long_codes = 0;
            for (int64_t k = first; k < last; k++) long_codes += codes.counts_[k] > kRun;
            runs_.assign(long_codes * D, T(0));
            target.resize(last - first), length.resize(last - first);
            T* run = runs_.data();
            for (int64_t k = first; k < last; k++) {
                const bool is_long = codes.counts_[k] > kRun;
                target[k - first] = is_long ? run : sums + (k - first) * D;
                run += is_long ? D : 0;
            }
        }

        void fold(int64_t code) {
            T *total = sums + code * D_, *run = target[code];
            if (run == total) return;
            for (int64_t i = 0; i < D_; i++) total[i] += run[i], run[i] = 0;
        }

        void finish() {
            for (int64_t code = 0; code < int64_t(target.size()); code++) fold(code);
        }

        T* const sums;
        std::vector<T*> target;
        std::vector<uint8_t> length;  // of the current run, modulo 256

    private:
        const int64_t D_;
        std::vector<T> runs_;
    };

    Indices indices_ = {};
    int64_t h_ = 0, N_ = 0, most_ = 0;
    const int64_t* counts_ = nullptr;
};

// Weighted counts, and sums of the rows of x, or of their units for cosine. weight may be null; counts are then int64.
struct Sums {
    void* counts;
    float* sums;
};
// Returns the place of an index out of range, or -1.
int64_t sum_codes(const SearchShape& shape, const Rows& x, const Indices& indices, const Rows* weight,
                  const Sums& result, const Parallel& parallel);

}  // namespace vqops
