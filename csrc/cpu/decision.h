// The float64 comparison of the codes that bounds left open, and the results of a search.
#pragma once

#include <cmath>
#include <cstdint>

#include "row_buffer.h"
#include "search.h"

namespace vqops {

// The best k codes so far by float64 cost, then index.
struct Ranking {
    explicit Ranking(int64_t k) : k(k) {}

    void add(double value, int64_t code) {
        int64_t i = size < k ? size : k - 1;
        if (size == k && !before(value, code, i)) return;
        for (; i > 0 && before(value, code, i - 1); i--) cost[i] = cost[i - 1], index[i] = index[i - 1];
        cost[i] = value, index[i] = code;
        if (size < k) size++;
    }

    bool before(double value, int64_t code, int64_t i) const {
        return value < cost[i] || (value == cost[i] && code < index[i]);
    }

    const int64_t k;
    int64_t size = 0;
    double cost[kLargestK];
    int64_t index[kLargestK];
};

// The power of two that brings a row's largest element to [1, 2): a cosine does not change with it.
static inline double unit_scale(const double* row, int64_t D) {
    double largest = 0;
    for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::fabs(row[i]));
    return largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, std::min(-std::ilogb(largest), 1000)) : 1;
}

// One thread's decisions. `take` a row, then `consider` codes, then `write`.
class Decision {
public:
    Decision(const SearchShape& shape, const Rows& rows, const Rows& codebook, const SearchResult& result)
        : x(shape.D), shape_(shape), rows_(rows), codebook_(codebook), result_(result), code_(shape.D) {}

    void take(int64_t h, int64_t n) { read_row(rows_, h, n, shape_.D, x.data); }

    void consider(int64_t h, int64_t k, Ranking& ranking) {
        read_row(codebook_, h, k, shape_.D, code_.data);
        if (!code_.finite()) return;
        ranking.add(instructions().exact_cost(x.data, code_.data, x.padded, shape_.cosine), k);
    }

    // Compares the row that was taken with every code.
    void scan(int64_t h, int64_t n) {
        Ranking ranking(result_.k);
        for (int64_t k = 0; k < shape_.K; k++) consider(h, k, ranking);
        tiers[ranking.size ? kScanned : kNoCode]++;
        write(h, n, ranking, INFINITY);
    }

    // What was found among the codes that bounds left open.
    void write_decided(int64_t h, int64_t n, const Ranking& ranking, bool certified) {
        tiers[ranking.size == 0 ? kNoCode : certified ? kCertified : kDecided]++;
        write(h, n, ranking, INFINITY);
    }

    // A certified row of a search for the index alone.
    void write(int64_t h, int64_t n, int64_t index) {
        tiers[kCertified]++;
        result_.indices[h * shape_.N + n] = index;
    }

    // A row without a code: masked, or not finite.
    void write_none(int64_t h, int64_t n, bool masked) {
        tiers[kNoCode]++;
        write(h, n, Ranking(result_.k), masked ? INFINITY : NAN);
    }

    AlignedRow x;
    int64_t tiers[kTiers] = {};

private:
    // Places beyond the ranked codes get index -1 and distance `missing`.
    void write(int64_t h, int64_t n, const Ranking& ranking, double missing) {
        const int64_t start = (h * shape_.N + n) * result_.k;
        const double square = shape_.cosine && result_.distances && ranking.size ? x.dot(x) : 0;
        for (int64_t i = 0; i < result_.k; i++) {
            const bool found = i < ranking.size;
            result_.indices[start + i] = found ? ranking.index[i] : -1;
            if (!result_.distances) continue;
            double distance = found ? ranking.cost[i] : missing;
            if (found && shape_.cosine) distance = 1 + (square > 0 ? distance / std::sqrt(square) : 0);
            if (rows_.dtype == DType::float64) static_cast<double*>(result_.distances)[start + i] = distance;
            else static_cast<float*>(result_.distances)[start + i] = float(distance);
        }
    }

    const SearchShape& shape_;
    const Rows& rows_;
    const Rows& codebook_;
    const SearchResult& result_;
    AlignedRow code_;
};

}  // namespace vqops
