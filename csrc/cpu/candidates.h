// Lists of the codes that a row's error bounds leave open.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "instructions.h"

namespace vqops {

class Candidates {
public:
    Candidates(int64_t rows, int64_t k)
        : threshold(rows), rest(rows), k_(int32_t(k)), capacity_(30 + 2 * k_), room_(capacity_ + kMostCodes),
          count_(rows), code_(rows * room_), lower_(rows * room_), least_(k > 1 ? rows * k : 0) {}

    // The lists as the screening pass fills them.
    OpenCodes open(int64_t codes, void* work) {
        return {threshold.data(), rest.data(), count_.data(), code_.data(), lower_.data(), capacity_, room_,
                int32_t(codes), this, full, k_ > 1 ? candidate : nullptr, too_many, k_, work};
    }

    void start(int64_t row) {
        threshold[row] = INFINITY;
        count_[row] = 0;
        if (k_ > 1) std::fill_n(&least_[row * k_], k_, INFINITY);
    }

    // A place without a row: no bound is below its threshold.
    void leave_out(int64_t row) { threshold[row] = NAN; }
    bool left_out(int64_t row) const { return std::isnan(threshold[row]); }

    void add(int64_t row, int64_t code, float lower, float upper) {
        if (overflowed(row)) return;
        lower_threshold(row, upper);
        const int64_t place = row * room_ + count_[row]++;
        code_[place] = int32_t(code);
        lower_[place] = lower;
        if (count_[row] >= capacity_) make_room(row);
    }

    // Takes the candidates of another list, of the same row and other codes.
    void merge(int64_t row, const Candidates& other) {
        if (overflowed(row)) return;
        if (other.overflowed(row)) return give_up(row);
        threshold[row] = std::min(threshold[row], other.threshold[row]);
        for (int32_t i = 0; i < other.count_[row]; i++) {
            const int64_t place = row * room_ + i;
            if (!(other.lower_[place] > threshold[row])) add(row, other.code_[place], other.lower_[place], INFINITY);
        }
    }

    void drop_excluded(int64_t row) {
        int32_t* code = &code_[row * room_];
        float* lower = &lower_[row * room_];
        int32_t kept = 0;
        for (int32_t i = 0; i < count_[row]; i++) {
            if (lower[i] > threshold[row]) continue;
            code[kept] = code[i];
            lower[kept++] = lower[i];
        }
        count_[row] = kept;
    }

    bool overflowed(int64_t row) const { return count_[row] < 0; }
    int32_t count(int64_t row) const { return count_[row]; }
    int32_t code(int64_t row, int32_t i) const { return code_[row * room_ + i]; }

    std::vector<float> threshold;  // k-th least upper bound of a row so far; -inf takes no more candidates, NaN is no row
    std::vector<float> rest;       // of a row's bound: from the lower to the upper one, whatever the code

private:
    void make_room(int64_t row) {
        drop_excluded(row);
        if (count_[row] >= capacity_) give_up(row);
    }

    void give_up(int64_t row) {
        count_[row] = -1;
        threshold[row] = -INFINITY;
    }

    static void full(void* self, int64_t row) { static_cast<Candidates*>(self)->make_room(row); }

    static void too_many(void* self, int64_t row) { static_cast<Candidates*>(self)->give_up(row); }

    static void candidate(void* self, int64_t row, int64_t code, float lower, float upper) {
        static_cast<Candidates*>(self)->add(row, code, lower, upper);
    }

    void lower_threshold(int64_t row, float upper) {
        if (!(upper < threshold[row])) return;
        if (k_ > 1) {
            float* least = &least_[row * k_];
            int32_t i = k_ - 1;
            for (; i > 0 && least[i - 1] > upper; i--) least[i] = least[i - 1];
            least[i] = upper;
            upper = least[k_ - 1];
        }
        threshold[row] = std::min(threshold[row], upper);
    }

    const int32_t k_, capacity_;   // clustered or random data leaves 1 to 3 candidates beside the k
    const int32_t room_;           // a panel's codes may come at once
    std::vector<int32_t> count_;   // -1: too many to hold
    std::vector<int32_t> code_;
    std::vector<float> lower_, least_;
};

}  // namespace vqops
