// Search without preparation: every code against all rows, from the codebook as it lies in memory.
//
// One thread: a range of the codes. Read: each code once, from memory; the rows, as float, from the first cache. The
// bounds need no centre, since differences of the values as given lose nothing: the float32 sum of (x_i - c_i)^2 is
// within (D + 4) u of the true one, relatively (docs/exactness.md). Each thread keeps its own candidates; they
// are merged and decided in float64 at the end.

#include "unprepared.h"

#include <memory>

#include "candidates.h"
#include "codebook.h"
#include "decide.h"

namespace vqops {
namespace {

constexpr int64_t kQueueBytes = 48 * 1024;  // of queued rows, per thread
constexpr int64_t kThreadWork = 1 << 17;    // differences, at least, per thread: 10 us, which starting one may cost

// The rows of one head, as the kernel reads them, and what bounds them.
struct UnpreparedRows {
    UnpreparedRows(const SearchShape& shape, int64_t most) : shape(shape) {
        values.reserve(most * shape.D);
        numbers.reserve(most);
        allowance.reserve(most);
    }

    // A finite row.
    void add(int64_t n, const double* row) {
        const double scale = shape.cosine ? unit_scale(row, shape.D) : 1;
        double square = 0;
        for (int64_t i = 0; i < shape.D; i++) {
            values.push_back(float(row[i] * scale));
            square += double(values.back()) * values.back();
        }
        numbers.push_back(n);
        // For cosine, the error of -x.c / |c| in units of |x|; for distances it is relative, and this is underflow.
        allowance.push_back(float(shape.cosine ? 1.02 * double(shape.D + 8) * 0x1p-23 * std::sqrt(square) + 0x1p-100
                                               : double(shape.D) * 0x1p-140));
        if (!stays_in_range(scale)) allowance.back() = HUGE_VALF;  // every code is a candidate
    }

    int64_t count() const { return int64_t(numbers.size()); }

    const SearchShape& shape;
    std::vector<int64_t> numbers;  // n of each row that is to be searched
    std::vector<float> values;     // [count, D]
    std::vector<float> allowance;  // what a value may err by in absolute terms
};

// One thread's candidates among its codes.
class UnpreparedCandidates {
public:
    UnpreparedCandidates(const SearchShape& shape, const UnpreparedRows& rows, int64_t k)
        : candidates(rows.count(), k), rows_(rows), relative_(1.02 * double(shape.D + 6) * 0x1p-24),
          factor_(shape.cosine ? 1 : float(1 - relative_ - 0x1p-23)), cosine_(shape.cosine) {
        for (int64_t r = 0; r < rows.count(); r++) candidates.start(r);
    }

    void compare(const Rows& codebook, int64_t h, int64_t begin, int64_t end) {
        const int64_t D = rows_.shape.D;
        const bool in_place = codebook.has_float_rows();
        std::vector<float> copies(in_place ? 0 : set_.group * D);
        for (int64_t k = begin; k < end; k += set_.group) {
            const int64_t count = std::min<int64_t>(set_.group, end - k);
            for (int64_t i = 0; i < count && !in_place; i++) read_row(codebook, h, k + i, D, &copies[i * D]);
            set_.unprepared(rows_.values.data(), rows_.count(), D, in_place ? codebook.floats(h, k) : copies.data(),
                            in_place ? codebook.row_stride : D, count, cosine_, factor_, candidates.threshold.data(), k,
                            {this, offer});
        }
    }

    Candidates candidates;

private:
    // `value` is the distance, or minus the cosine times |x|; NaN stands for one that float32 can't hold.
    static void offer(void* self, int64_t row, int64_t code, float value) {
        UnpreparedCandidates& d = *static_cast<UnpreparedCandidates*>(self);
        if (value != value) return d.candidates.add(row, code, -INFINITY, INFINITY);
        const double allowance = d.rows_.allowance[row];
        const double error = d.cosine_ ? allowance : d.relative_ * value + allowance;
        // The kernel compares without the allowance, so the upper bound has it twice.
        const double upper = value + error + allowance;
        d.candidates.add(row, code, float(value - error - std::fabs(value) * 0x1p-23),
                         float(upper + std::fabs(upper) * 0x1p-23));
    }

    const UnpreparedRows& rows_;
    const Instructions& set_ = instructions();
    const double relative_;
    const float factor_;
    const bool cosine_;
};

// Decides row r of those that were compared, among its candidates.
void settle(Candidates& candidates, int64_t r, int64_t h, int64_t n, int64_t k, Decision& decision, bool queued) {
    decision.take(h, n);
    if (candidates.overflowed(r)) return decision.scan(h, n);
    candidates.drop_excluded(r);
    const int32_t count = candidates.count(r);
    Ranking ranking(k);
    for (int32_t i = 0; i < count; i++) decision.consider_any(h, candidates.code(r, i), ranking);
    decision.write_ranked(h, n, ranking, queued ? kScanned : count == 1 ? kCertified : kDecided);
}

}  // namespace

void scan_queue(const SearchShape& shape, const Rows& x, const Rows& codebook, int64_t h, const int64_t* rows,
                int64_t count, Decision& decision, int64_t k) {
    if (!is_unprepared(0, x, codebook)) {
        for (int64_t i = 0; i < count; i++) decision.take(h, rows[i]), decision.scan(h, rows[i]);
        return;
    }
    const int64_t most = std::max<int64_t>(1, kQueueBytes / (4 * shape.D));
    for (int64_t begin = 0; begin < count; begin += most) {
        const int64_t end = std::min(begin + most, count);
        UnpreparedRows taken(shape, end - begin);
        for (int64_t i = begin; i < end; i++) {
            decision.read(h, rows[i]);
            taken.add(rows[i], decision.x.data);
        }
        UnpreparedCandidates found(shape, taken, k);
        found.compare(codebook, h, 0, shape.K);
        for (int64_t r = 0; r < end - begin; r++)
            settle(found.candidates, r, h, taken.numbers[r], k, decision, true);
    }
}

void search_unprepared(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const SearchResult& result, const Parallel& parallel) {
    Decision decision(shape, x, codebook, result);
    for (int64_t h = 0; h < shape.H; h++) {
        UnpreparedRows rows(shape, shape.N);
        for (int64_t n = 0; n < shape.N; n++) {
            const bool kept = mask.keeps(h, n);
            if (kept) decision.read(h, n);
            if (kept && decision.x.finite()) rows.add(n, decision.x.data);
            else decision.write_none(h, n, !kept);
        }
        if (rows.numbers.empty()) continue;
        const int64_t useful = std::min(shape.K / 64, rows.count() * shape.K * shape.D / kThreadWork);
        const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, useful));
        std::vector<std::unique_ptr<UnpreparedCandidates>> parts(threads);
        parallel.over(threads, [&](int64_t begin, int64_t end) {
            const DefaultFloatMode mode_of_thread;
            for (int64_t t = begin; t < end; t++) {
                parts[t] = std::make_unique<UnpreparedCandidates>(shape, rows, result.k);
                parts[t]->compare(codebook, h, shape.K * t / threads, shape.K * (t + 1) / threads);
            }
        });
        Candidates& all = parts[0]->candidates;
        for (int64_t r = 0; r < rows.count(); r++) {
            for (int64_t t = 1; t < threads; t++) all.merge(r, parts[t]->candidates);
            settle(all, r, h, rows.numbers[r], result.k, decision, false);
        }
    }
    for (int tier = 0; result.tiers && tier < kTiers; tier++) result.tiers[tier] += decision.tiers[tier];
}

}  // namespace vqops
