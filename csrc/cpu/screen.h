// Screen: the fast pass over a block of rows, and the decisions that it leaves open.
//
// One block of rows of x against all K codes, in panels of 16 or 32.
//   registers     14 x 32 sums (AVX-512), 6 x 16 (AVX2) or 32 x 32 (AMX: sets/tile_pass.inl), the inner product of a tile
//   first cache   the tile's codes, D + 1 words each, while all rows of the block pass over them
//   second cache  the block's rows, centred, scaled and rounded to words, at most 96 KB (AMX: 512 KB)
// A word is a float or two dimensions as bfloat16. Read: x once, the packed codebook once per block. Written: one index
// per row. Operations: 2 N K (D + 1), fused.
// The product gives lower bounds (docs/exactness.md); a code stays a candidate while its lower bound does not exceed
// the least upper bound of its row. Rows left with one candidate are done; the others are decided in float64 (exact.h).
// A row with more candidates than its list holds is queued: where the set rounds to bfloat16, for one that takes float
// (precise.h); then it is compared with all codes by float32 differences, whose error is relative to the distance itself
// (unprepared.h).
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "candidates.h"
#include "codebook.h"
#include "decide.h"
#include "precise.h"
#include "unprepared.h"

namespace vqops {

constexpr float kFarRow = 0x1p60f;     // rows beyond could overflow float32 in a product with a code
constexpr int64_t kDeepest = 1 << 17;  // the bound's constants hold up to here

// Rows that a thread takes at once of those that it is to have.
inline int64_t rows_of_block(const Instructions& set, int64_t D, int64_t share) {
    const int64_t tile = set.tile, fitting = set.block_bytes / set.row_bytes(D) / tile * tile;
    return std::max(tile, std::min({int64_t(set.most_rows), fitting, round_up(share, tile)}));
}

// One thread's workspace for blocks of one shape.
class Screen {
public:
    Screen(const Instructions& set, const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
           const SearchResult& result, int64_t rows)
        : shape_(shape), x_(x), codebook_(codebook), mask_(mask), result_(result), set_(set), most_(rows),
          block_(rows * set_.row_bytes(shape.D)), work_(set_.screen_bytes(rows, shape.D, result.k)),
          values_(new float[set_.tile * shape.D]), zeros_(new float[shape.D]()), candidates_(rows, result.k),
          decision_(shape, x, codebook, result), rows_(rows) {
        std::fill_n(block_.data, rows * set_.row_bytes(shape.D), 0);  // places without a row are multiplied, too
    }

    // Rows [begin, end) of head h. `precise`, or null: of the same codes, where that is its head `precise_head`.
    void run(int64_t h, int64_t begin, int64_t end, const Packed& packed, PreciseCodebook* precise,
             int64_t precise_head) {
        std::vector<int64_t>& rows = given_rows_;
        rows.resize(end - begin);
        std::iota(rows.begin(), rows.end(), begin);
        if (precise && precise->takes_all()) return run_precisely(h, *precise, precise_head, rows.data(), end - begin);
        const int64_t queued = screen(h, rows.data(), end - begin, packed);
        if (precise && precise->takes(end - begin, queued) && queued > 0)
            return run_precisely(h, *precise, precise_head, rows_.data(), queued);
        if (queued > 0) scan_queue(shape_, x_, codebook_, h, rows_.data(), queued, decision_, result_.k);
    }

    // Rows that were decided so. Those that were screened precisely count as scanned, unless they have no code.
    int64_t rows_of(Tier tier) const {
        int64_t count = decision_.tiers[tier];
        if (!precise_) return count;
        for (const Tier again : {kCertified, kDecided, kScanned, kNoCode})
            if (tier == (again == kNoCode ? kNoCode : kScanned)) count += precise_->decision_.tiers[again];
        return count;
    }

private:
    // Settles rows of head h but for those with too many candidates: returns their number, and leaves them in `rows_`.
    int64_t screen(int64_t h, const int64_t* rows, int64_t count, const Packed& packed) {
        packed_ = &packed;
        int64_t screened = 0, taken = 0;
        for (int64_t i = 0; i < count; i++) {
            if (take(h, rows[i], taken)) rows_[screened + taken++] = rows[i];
            if (taken < set_.tile && i + 1 < count) continue;
            place(h, screened, taken);
            screened += taken;
            taken = 0;
        }
        const int64_t padded = round_up(screened, set_.tile);
        for (int64_t r = screened; r < padded; r++) candidates_.leave_out(r);
        set_.screen(block_.data, padded, packed.as_read(set_), candidates_.open(packed.header->screened, work_.data));
        int64_t queued = 0;
        for (int64_t r = 0; r < screened; r++)
            if (!candidates_.left_out(r) && !decide(h, rows_[r], r)) rows_[queued++] = rows_[r];
        return queued;
    }

    void run_precisely(int64_t h, PreciseCodebook& precise, int64_t precise_head, const int64_t* rows, int64_t count) {
        if (!precise_) {
            const int64_t most = rows_of_block(precise.set, shape_.D, most_);
            precise_ = std::make_unique<Screen>(precise.set, shape_, x_, codebook_, mask_, result_, most);
        }
        Screen& screen = *precise_;
        const Packed packed = precise.head(precise_head);
        for (int64_t i = 0; i < count; i += screen.most_) {
            const int64_t queued = screen.screen(h, rows + i, std::min(screen.most_, count - i), packed);
            if (queued > 0)
                scan_queue(shape_, x_, codebook_, h, screen.rows_.data(), queued, screen.decision_, result_.k);
        }
    }

    // Reads row n as vector i of those to be placed. False: it is settled without screening.
    bool take(int64_t h, int64_t n, int64_t i) {
        if (!mask_.keeps(h, n)) return decision_.write_none(h, n, true), false;
        float* const values = &values_[i * shape_.D];
        vectors_[i] = values;
        if (given()) return vectors_[i] = float_row(x_, h, n, shape_.D, values), true;
        const double scale = read_double(h, n, values);
        if (!shape_.cosine) return true;
        const int64_t first = packed_->header->first;
        const auto is_zero = [](float value) { return value == 0; };
        if (!result_.distances && first >= 0 && std::all_of(values, values + shape_.D, is_zero))
            return decision_.write(h, n, first), false;  // scores 0 with every code
        return stays_in_range(scale) || (settle(h, n), false);
    }

    // Rows are placed as given, except float64 rows and those of a cosine search.
    bool given() const { return !shape_.cosine && x_.dtype != DType::float64; }

    // For cosine, a power of two brings each row to about norm 1: returns the factor.
    double read_double(int64_t h, int64_t n, float* out) {
        decision_.read(h, n);
        const double* row = decision_.x.data;
        const double scale = shape_.cosine ? unit_scale(row, shape_.D) : packed_->header->scale;
        for (int64_t i = 0; i < shape_.D; i++)
            out[i] = float((row[i] - (shape_.cosine ? 0 : packed_->centre[i])) * scale);
        return scale;
    }

    // Puts what was taken, rows_[first, first + count), in its places of the block, with the constants of its bounds.
    void place(int64_t h, int64_t first, int64_t count) {
        RowNorm norms[kMostTile];
        const float *centre = given() ? packed_->centre : zeros_.get(), scale = given() ? packed_->header->scale : 1;
        set_.place_rows({vectors_, count, shape_.D, centre, scale}, first, block_.data, norms);
        for (int64_t i = 0, r = first; i < count; i++, r++) {
            if (norms[i].square <= kFarRow * kFarRow && shape_.D <= kDeepest) {
                candidates_.rest[r] = rest_of(norms[i].at_least, *packed_->header);
                candidates_.start(r);
            } else {
                candidates_.leave_out(r);
                settle(h, rows_[r]);
            }
        }
    }

    // A row that no bound covers.
    void settle(int64_t h, int64_t n) {
        decision_.read(h, n);
        if (!decision_.x.finite()) return decision_.write_none(h, n, false);
        decision_.take(h, n);
        decision_.scan(h, n);
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
    const int64_t most_;  // rows of a block
    const Packed* packed_ = nullptr;
    const CacheLines block_;  // as the set lays rows out
    const CacheLines work_;
    std::unique_ptr<float[]> values_, zeros_;
    const float* vectors_[kMostTile];
    Candidates candidates_;
    Decision decision_;
    std::vector<int64_t> rows_, given_rows_;
    std::unique_ptr<Screen> precise_;
};

}  // namespace vqops
