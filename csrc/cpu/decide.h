// The float64 comparison of the codes that bounds left open, and the results of a search.
#pragma once

#include <cmath>
#include <cstdint>

#include "../distance.h"
#include "row_buffer.h"
#include "search.h"

namespace vqops {

// The best k codes so far by float64 cost, then index.
struct Ranking {
    explicit Ranking(int64_t k) : k(k) {}

    void add(double value, int64_t code) {
        if (size == k && !before(value, code, k - 1)) return;
        int64_t i = size < k ? size++ : k - 1;
        for (; i > 0 && before(value, code, i - 1); i--) cost[i] = cost[i - 1], index[i] = index[i - 1];
        cost[i] = value, index[i] = code;
    }

    bool before(double value, int64_t code, int64_t i) const {
        return vqops::before(value, code, cost[i], index[i]);
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

// Of that power of two: the decision's x.c, of values as given, stays within the range of float64 for any code whose
// c.c does. Beyond, products overflow or vanish, and the decision goes by that; so must the screening pass.
static inline bool stays_in_range(double scale) { return scale >= 0x1p-400 && scale <= 0x1p400; }

// One thread's decisions. `take` a row, then `consider` codes, then `write`.
class Decision {
public:
    Decision(const SearchShape& shape, const Rows& rows, const Rows& codebook, const SearchResult& result)
        : x(shape.D), shape_(shape), rows_(rows), codebook_(codebook), result_(result), code_(shape.D),
          floats_(!shape.cosine && rows.has_float_rows() && codebook.has_float_rows()) {}

    // Reads row n into x.
    void read(int64_t h, int64_t n) { read_row(rows_, h, n, shape_.D, x.data); }

    void take(int64_t h, int64_t n) {
        if (floats_) row_ = rows_.floats(h, n);
        else read(h, n);
    }

    // A finite code.
    void consider(int64_t h, int64_t k, Ranking& ranking) {
        if (floats_) return ranking.add(set_.exact_distance(row_, codebook_.floats(h, k), shape_.D), k);
        read_row(codebook_, h, k, shape_.D, code_.data);
        ranking.add(set_.exact_cost(x.data, code_.data, x.padded, shape_.cosine), k);
    }

    // A code that may not be finite, which a finite distance rules out.
    void consider_any(int64_t h, int64_t k, Ranking& ranking) {
        const double distance = floats_ ? set_.exact_distance(row_, codebook_.floats(h, k), shape_.D) : NAN;
        if (std::isfinite(distance)) return ranking.add(distance, k);
        read_row(codebook_, h, k, shape_.D, code_.data);
        if (code_.finite()) consider(h, k, ranking);
    }

    // Compares the row that was taken with every code.
    void scan(int64_t h, int64_t n) {
        Ranking ranking(result_.k);
        for (int64_t k = 0; k < shape_.K; k++) consider_any(h, k, ranking);
        write_ranked(h, n, ranking, kScanned);
    }

    // Writes the ranking of the codes that were considered.
    void write_ranked(int64_t h, int64_t n, const Ranking& ranking, Tier tier) {
        tiers[ranking.size == 0 ? kNoCode : tier]++;
        write(h, n, ranking);
    }

    // A certified row of a search for the index alone.
    void write(int64_t h, int64_t n, int64_t index) {
        tiers[kCertified]++;
        result_.indices[h * shape_.N + n] = index;
    }

    // A row without a code: masked, or not finite.
    void write_none(int64_t h, int64_t n, bool masked) {
        tiers[kNoCode]++;
        for (int64_t i = 0; i < result_.k; i++) put(h, n, i, -1, masked ? INFINITY : NAN);
    }

    AlignedRow x;
    int64_t tiers[kTiers] = {};

private:
    // Places beyond the ranked codes get index -1 and an infinite distance.
    void write(int64_t h, int64_t n, const Ranking& ranking) {
        const double square = shape_.cosine && result_.distances && ranking.size ? x.dot(x) : 0;
        for (int64_t i = 0; i < ranking.size; i++) {
            double distance = ranking.cost[i];
            if (shape_.cosine) distance = 1 + (square > 0 ? distance / std::sqrt(square) : 0);
            put(h, n, i, ranking.index[i], distance);
        }
        for (int64_t i = ranking.size; i < result_.k; i++) put(h, n, i, -1, INFINITY);
    }

    void put(int64_t h, int64_t n, int64_t i, int64_t index, double distance) {
        const int64_t place = (h * shape_.N + n) * result_.k + i;
        result_.indices[place] = index;
        if (!result_.distances) return;
        if (rows_.dtype == DType::float64) static_cast<double*>(result_.distances)[place] = distance;
        else static_cast<float*>(result_.distances)[place] = float(distance);
    }

    const SearchShape& shape_;
    const Rows& rows_;
    const Rows& codebook_;
    const SearchResult& result_;
    const Instructions& set_ = instructions();
    AlignedRow code_;
    const bool floats_;  // rows and codes lie in memory as `exact_distance` takes them
    const float* row_ = nullptr;
};

}  // namespace vqops
