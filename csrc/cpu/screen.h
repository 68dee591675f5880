// Screen: the fast pass over a block of rows, and the decisions that it leaves open.
//
// One block of rows of x against all K codes, in panels of 16 or 32.
//   registers     14 x 32 sums (AVX-512) or 6 x 16 (AVX2), the whole inner product of a tile
//   first cache   the tile's codes, D + 1 words each, while all rows of the block pass over them
//   second cache  the block's rows, centred, scaled and rounded to words, at most 96 KB
// A word is a float or two dimensions as bfloat16. Read: x once, the packed codebook once per block. Written: one index
// per row. Operations: 2 N K (D + 1), fused.
// The product gives lower bounds (docs/exactness.md); a code stays a candidate while its lower bound does not exceed
// the least upper bound of its row. Rows left with one candidate are done; the others are decided in float64 (exact.h).
// A row with more candidates than its list holds is queued: compared with all codes by float32 differences, whose error
// is relative to the distance itself (unprepared.h).
#pragma once

#include <algorithm>
#include <memory>

#include "candidates.h"
#include "codebook.h"
#include "decide.h"
#include "unprepared.h"

namespace vqops {

constexpr int64_t kMostRows = 98;           // seven tiles of 14, 16 of six; more did not pay
constexpr int64_t kBlockBytes = 96 * 1024;  // a fraction of any second cache
constexpr float kFarRow = 0x1p60f;          // rows beyond could overflow float32 in a product with a code
constexpr int64_t kDeepest = 1 << 17;       // the bound's constants hold up to here

// One thread's workspace for blocks of one shape.
class Screen {
public:
    Screen(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
           const SearchResult& result, int64_t rows)
        : shape_(shape), x_(x), codebook_(codebook), mask_(mask), result_(result), set_(instructions()),
          depth_(depth_of(shape.D)), stride_(round_up(depth_, 16)), words_(new uint32_t[rows * stride_]()),
          given_(new float[shape.D]), zeros_(new float[shape.D]()), candidates_(rows, result.k),
          decision_(shape, x, codebook, result) {}

    void run(int64_t h, int64_t begin, int64_t end, const Packed& packed) {
        packed_ = &packed;
        int64_t screened = 0;
        for (int64_t n = begin; n < end; n++)
            if (take(h, n, screened)) rows_[screened++] = n;
        const int64_t padded = round_up(screened, set_.tile);
        for (int64_t r = screened; r < padded; r++) {
            std::fill_n(words_.get() + r * stride_, stride_, 0);
            candidates_.threshold[r] = -INFINITY;
        }
        set_.screen(words_.get(), padded, stride_, packed.as_read(), candidates_.open(packed.header->screened));
        int64_t queued = 0;
        for (int64_t r = 0; r < screened; r++)
            if (!decide(h, rows_[r], r)) rows_[queued++] = rows_[r];
        if (queued > 0) scan_queue(shape_, x_, codebook_, h, rows_, queued, decision_, result_.k);
    }

    const int64_t* tiers() const { return decision_.tiers; }

private:
    // Puts row n in place r, with the constants of its bound. False: the row is settled without screening.
    bool take(int64_t h, int64_t n, int64_t r) {
        if (!mask_.keeps(h, n)) return decision_.write_none(h, n, true), false;
        const int64_t D = shape_.D;
        uint32_t* out = words_.get() + r * stride_;
        RowNorms norms;
        bool near = true;
        if (shape_.cosine || x_.dtype == DType::float64) {
            const double scale = read_double(h, n);
            norms = set_.place_row(given_.get(), zeros_.get(), 1, D, out);
            near = !shape_.cosine || stays_in_range(scale);
        } else {
            const float* row = float_row(x_, h, n, D, given_.get());
            norms = set_.place_row(row, packed_->centre, packed_->header->scale, D, out);
        }
        if (shape_.cosine && norms.square == 0 && !result_.distances && packed_->header->first >= 0)
            return decision_.write(h, n, packed_->header->first), false;  // scores 0 with every code
        if (!near || !(norms.square <= kFarRow * kFarRow) || D > kDeepest) {
            decision_.read(h, n);
            const bool finite = decision_.x.finite();
            decision_.take(h, n);
            if (finite) decision_.scan(h, n);
            else decision_.write_none(h, n, false);
            return false;
        }
        candidates_.rest[r] = row_bound(norms, *packed_, D, shape_.cosine, out);
        candidates_.start(r);
        return true;
    }

    // For float64 rows and for cosine, where a power of two brings each row to about norm 1: returns the factor.
    double read_double(int64_t h, int64_t n) {
        decision_.read(h, n);
        const double* row = decision_.x.data;
        const double scale = shape_.cosine ? unit_scale(row, shape_.D) : packed_->header->scale;
        for (int64_t i = 0; i < shape_.D; i++)
            given_[i] = float((row[i] - (shape_.cosine ? 0 : packed_->centre[i])) * scale);
        return scale;
    }

    // False: more candidates than the list holds.
    bool decide(int64_t h, int64_t n, int64_t r) {
        const Header& header = *packed_->header;
        if (candidates_.overflowed(r)) return false;
        candidates_.drop_excluded(r);
        const int64_t unscreened = header.far + (result_.k > 1 ? header.repeats : 0);
        const int32_t count = candidates_.count(r);
        if (!result_.distances && unscreened == 0 && count == 1)
            return decision_.write(h, n, packed_->code[candidates_.code(r, 0)]), true;
        Ranking ranking(result_.k);
        decision_.take(h, n);
        for (int32_t i = 0; i < count; i++) decision_.consider(h, packed_->code[candidates_.code(r, i)], ranking);
        for (int64_t i = 0; i < unscreened; i++) decision_.consider(h, packed_->code[header.screened + i], ranking);
        decision_.write_ranked(h, n, ranking, count == 1 && unscreened == 0 ? kCertified : kDecided);
        return true;
    }

    const SearchShape& shape_;
    const Rows& x_;
    const Rows& codebook_;
    const RowMask& mask_;
    const SearchResult& result_;
    const Instructions& set_;
    const Packed* packed_ = nullptr;
    const int64_t depth_, stride_;
    std::unique_ptr<uint32_t[]> words_;
    std::unique_ptr<float[]> given_, zeros_;
    Candidates candidates_;
    Decision decision_;
    int64_t rows_[kMostRows];
};

}  // namespace vqops
