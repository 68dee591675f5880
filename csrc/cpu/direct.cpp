// Direct search: every code against all rows, from the codebook as it lies in memory.
//
// One thread: a range of the codes. Read: each code once, from memory; the rows, as float, from the first cache. The
// bounds need no centre, since differences of the values as given lose nothing: the float32 sum of (x_i - c_i)^2 is
// within (D + 4) u of the true one, relatively (exactness.md, "Few rows"). Each thread keeps its own candidates; they
// are merged and decided in float64 at the end.

#include "direct.h"

#include <memory>

#include "candidates.h"
#include "codebook.h"
#include "decision.h"

namespace vqops {
namespace {

// The rows of one head, as the kernel reads them, and what bounds them.
struct DirectRows {
    DirectRows(const SearchShape& shape, const Rows& x, const RowMask& mask, int64_t h, Decision& decision)
        : group(instructions().group), stride(round_up(shape.D, group)) {
        kept.reserve(round_up(shape.N, group) * stride);
        for (int64_t n = 0; n < shape.N; n++) {
            if (!mask.keeps(h, n)) {
                decision.write_none(h, n, true);
                continue;
            }
            decision.take(h, n);
            if (!decision.x.finite()) {
                decision.write_none(h, n, false);
                continue;
            }
            const double scale = shape.cosine ? unit_scale(decision.x.data, shape.D) : 1;
            double square = 0;
            for (int64_t i = 0; i < shape.D; i++) {
                kept.push_back(float(decision.x.data[i] * scale));
                square += double(kept.back()) * kept.back();
            }
            kept.resize(round_up(int64_t(kept.size()), stride), 0.0f);
            numbers.push_back(n);
            // For cosine, the error of -x.c / |c| in units of |x|; for distances it is relative, and this is underflow.
            allowance.push_back(float(shape.cosine ? 1.02 * double(shape.D + 8) * 0x1p-23 * std::sqrt(square) + 0x1p-100
                                                   : double(shape.D) * 0x1p-140));
        }
        padded = round_up(int64_t(numbers.size()), group);
        kept.resize(padded * stride, 0.0f);
    }

    const int64_t group, stride;
    int64_t padded = 0;
    std::vector<int64_t> numbers;         // n of each row that is to be searched
    std::vector<float> kept;              // [padded, stride]
    std::vector<float> allowance;         // what a value may err by in absolute terms
};

// One thread's candidates among its codes.
class DirectCandidates {
public:
    DirectCandidates(const SearchShape& shape, const DirectRows& rows, int64_t k)
        : candidates(rows.padded, k), rows_(rows), relative_(1.02 * double(shape.D + 6) * 0x1p-24),
          factor_(shape.cosine ? 1 : float(1 - relative_ - 0x1p-23)), cosine_(shape.cosine) {
        for (int64_t r = 0; r < rows.padded; r++) candidates.start(r);
        for (int64_t r = int64_t(rows.numbers.size()); r < rows.padded; r++) candidates.threshold[r] = -INFINITY;
    }

    void compare(const float* code, int64_t k) {
        instructions().direct(rows_.kept.data(), rows_.padded, rows_.stride, code, cosine_, factor_,
                              candidates.threshold.data(), k, {this, offer});
    }

    Candidates candidates;

private:
    // `value` is the distance, or minus the cosine times |x|; NaN stands for one that float32 can't hold.
    static void offer(void* self, int64_t row, int64_t code, float value) {
        DirectCandidates& d = *static_cast<DirectCandidates*>(self);
        if (row >= int64_t(d.rows_.numbers.size())) return;
        if (value != value) return d.candidates.add(row, code, -INFINITY, INFINITY);
        const double allowance = d.rows_.allowance[row], error = d.cosine_ ? allowance : d.relative_ * value + allowance;
        // The kernel compares without the allowance, so the upper bound has it twice.
        d.candidates.add(row, code, float(value - error - std::fabs(value) * 0x1p-23), value + error + allowance);
    }

    const DirectRows& rows_;
    const double relative_;
    const float factor_;
    const bool cosine_;
};

}  // namespace

void search_direct(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                   const SearchResult& result, const Parallel& parallel) {
    const DefaultFloatMode mode;
    const int64_t D = shape.D;
    Decision decision(shape, x, codebook, result);
    for (int64_t h = 0; h < shape.H; h++) {
        const DirectRows rows(shape, x, mask, h, decision);
        if (rows.numbers.empty()) continue;
        const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(parallel.threads, shape.K / 64));
        std::vector<std::unique_ptr<DirectCandidates>> parts(threads);
        parallel.over(threads, [&](int64_t begin, int64_t end) {
            const DefaultFloatMode mode_of_thread;
            std::vector<float> buffer(rows.stride, 0.0f);
            for (int64_t t = begin; t < end; t++) {
                parts[t] = std::make_unique<DirectCandidates>(shape, rows, result.k);
                for (int64_t k = shape.K * t / threads; k < shape.K * (t + 1) / threads; k++) {
                    const float* code = float_row(codebook, h, k, D, buffer.data());
                    if (code != buffer.data() && D != rows.stride) {  // the kernel reads whole vectors
                        std::copy(code, code + D, buffer.data());
                        code = buffer.data();
                    }
                    parts[t]->compare(code, k);
                }
            }
        });
        Candidates& all = parts[0]->candidates;
        for (int64_t r = 0; r < int64_t(rows.numbers.size()); r++) {
            const int64_t n = rows.numbers[r];
            for (int64_t t = 1; t < threads; t++) all.merge(r, parts[t]->candidates);
            decision.take(h, n);
            if (all.overflowed(r)) {
                decision.scan(h, n);
                continue;
            }
            all.drop_excluded(r);
            Ranking ranking(result.k);
            for (int32_t i = 0; i < all.count(r); i++) decision.consider(h, all.code(r, i), ranking);
            decision.write_decided(h, n, ranking, all.count(r) == 1);
        }
    }
    for (int tier = 0; result.tiers && tier < kTiers; tier++) result.tiers[tier] += decision.tiers[tier];
}

}  // namespace vqops
