// Lists of the codes that a row's error bounds leave open.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace vqops {

class Candidates {
public:
    Candidates(int64_t rows, int64_t k)
        : threshold(rows), k_(int32_t(k)), capacity_(30 + 2 * k_), count_(rows), code_(rows * capacity_),
          lower_(rows * capacity_), least_(k > 1 ? rows * k : 0) {}

    void start(int64_t row) {
        threshold[row] = INFINITY;
        count_[row] = 0;
        if (k_ > 1) std::fill_n(&least_[row * k_], k_, INFINITY);
    }

    void add(int64_t row, int64_t code, float lower, double upper) {
        if (overflowed(row)) return;
        lower_threshold(row, float(upper + std::fabs(upper) * 0x1p-23));
        if (count_[row] == capacity_) drop_excluded(row);
        if (count_[row] == capacity_) {
            count_[row] = capacity_ + 1;
            threshold[row] = -INFINITY;
            return;
        }
        const int64_t place = row * capacity_ + count_[row]++;
        code_[place] = int32_t(code);
        lower_[place] = lower;
    }

    // What another list of the same row's other codes holds.
    void merge(int64_t row, const Candidates& other) {
        if (overflowed(row)) return;
        if (other.overflowed(row)) {
            count_[row] = capacity_ + 1;
            return;
        }
        threshold[row] = std::min(threshold[row], other.threshold[row]);
        for (int32_t i = 0; i < other.count_[row]; i++) {
            const int64_t place = row * capacity_ + i;
            if (!(other.lower_[place] > threshold[row])) add(row, other.code_[place], other.lower_[place], INFINITY);
        }
    }

    void drop_excluded(int64_t row) {
        int32_t* code = &code_[row * capacity_];
        float* lower = &lower_[row * capacity_];
        int32_t kept = 0;
        for (int32_t i = 0; i < count_[row]; i++) {
            if (lower[i] > threshold[row]) continue;
            code[kept] = code[i];
            lower[kept++] = lower[i];
        }
        count_[row] = kept;
    }

    bool overflowed(int64_t row) const { return count_[row] > capacity_; }
    int32_t count(int64_t row) const { return count_[row]; }
    int32_t code(int64_t row, int32_t i) const { return code_[row * capacity_ + i]; }

    std::vector<float> threshold;  // k-th least upper bound of a row so far; -inf takes no more candidates

private:
    void lower_threshold(int64_t row, float upper) {
        if (!(upper < threshold[row])) return;
        if (k_ > 1) {
            float* least = &least_[row * k_];
            int32_t i = k_ - 1;
            for (; i > 0 && least[i - 1] > upper; i--) least[i] = least[i - 1];
            least[i] = upper;
            upper = least[k_ - 1];
        }
        threshold[row] = upper;
    }

    const int32_t k_, capacity_;   // clustered or random data leaves 1 to 3 candidates beside the k
    std::vector<int32_t> count_;   // capacity + 1: too many to hold
    std::vector<int32_t> code_;
    std::vector<float> lower_, least_;
};

}  // namespace vqops
