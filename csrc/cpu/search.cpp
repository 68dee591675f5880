// Search: the nearest code of each row, certified exact.
//
// One task: a block of rows of x against all K codes, in panels of 16.
//   registers     6 x 16 sums (AVX2), the whole inner product of a tile
//   first cache   one panel of codes, D + 1 rows of 16 floats, while all rows of the block pass over it
//   second cache  the block's rows, centred and scaled as float, at most 96 KB
// Read: x once, the packed codebook once a block. Written: one index a row. Operations: 2 N K (D + 1), fused.
// The product gives lower bounds (exactness.md); a code stays a candidate while its lower bound does not exceed the
// least upper bound of its row. Rows left with one candidate are done; the others are decided in float64 (exact.h).

#include "search.h"

#include <atomic>
#include <memory>

#include "candidates.h"
#include "codebook.h"
#include "decision.h"
#include "direct.h"

namespace vqops {
namespace {

constexpr int64_t kMostRows = 96;           // 16 tiles of six share a panel; more did not pay
constexpr int64_t kBlockBytes = 96 * 1024;  // a fraction of any second cache
constexpr float kFarRow = 0x1p60f;          // rows beyond could overflow float32 in a product with a code
constexpr int64_t kDeepest = 1 << 17;       // the bound's constants hold up to here

// One thread's workspace for blocks of one shape.
class Block {
public:
    Block(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
          const SearchResult& result, int64_t rows)
        : shape_(shape), x_(x), mask_(mask), result_(result), set_(instructions()),
          stride_(round_up(shape.D + 1, 16)), values_(new float[rows * stride_]), given_(new float[shape.D]),
          candidates_(rows, result.k), decision_(shape, x, codebook, result) {}

    void search(int64_t h, int64_t begin, int64_t end, const Packed& packed) {
        packed_ = &packed;
        int64_t screened = 0;
        for (int64_t n = begin; n < end; n++)
            if (take(h, n, screened)) rows_[screened++] = n;
        const int64_t padded = round_up(screened, set_.tile);
        for (int64_t r = screened; r < padded; r++) {
            std::fill_n(values_.get() + r * stride_, stride_, 0.0f);
            candidates_.threshold[r] = -INFINITY;
        }
        set_.screen(values_.get(), padded, stride_, packed.panels, packed.panel_count(), packed.depth(), packed.start,
                    candidates_.threshold.data(), {this, offer});
        for (int64_t r = 0; r < screened; r++) decide(h, rows_[r], r);
    }

    const int64_t* tiers() const { return decision_.tiers; }

private:
    // Centres row n into place r, with the constants of its bound. False: the row is settled without screening.
    bool take(int64_t h, int64_t n, int64_t r) {
        if (!mask_.keeps(h, n)) return decision_.write_none(h, n, true), false;
        const int64_t D = shape_.D;
        float* out = values_.get() + r * stride_;
        double square;
        if (shape_.cosine || x_.dtype == DType::float64) {
            square = take_double(h, n, out);
        } else {
            const float* row = float_row(x_, h, n, D, given_.get());
            square = set_.centre_row(row, packed_->centre, packed_->header->scale, D, out);
        }
        if (shape_.cosine && square == 0 && !result_.distances && packed_->header->first >= 0)
            return decision_.write(h, n, packed_->header->first), false;  // scores 0 with every code
        if (!(square <= double(kFarRow) * kFarRow) || D > kDeepest) {
            decision_.take(h, n);
            if (decision_.x.finite()) decision_.scan(h, n);
            else decision_.write_none(h, n, false);
            return false;
        }
        // exactness.md: |x'| rounded up, the coefficient of |x'| |c'|, and the terms that no code changes.
        const double norm = std::sqrt(square) * (1 + 1e-5 + double(D) * 0x1p-23) + double(D) * 0x1p-70;
        const double coefficient = 1.02 * double(D + 5) * 0x1p-24;
        const double decision = packed_->header->decision * (shape_.cosine ? norm : norm * norm);
        out[D] = std::nextafter(float(coefficient * norm), INFINITY);
        product_[r] = 2.02 * out[D];
        always_[r] = 2 * (decision + 0x1p-120 * double(D) * (1 + norm));
        candidates_.start(r);
        return true;
    }

    // Through float64, for float64 rows and for cosine, where a power of two brings each row to about norm 1.
    double take_double(int64_t h, int64_t n, float* out) {
        decision_.take(h, n);
        const double* row = decision_.x.data;
        const double scale = shape_.cosine ? unit_scale(row, shape_.D) : packed_->header->scale;
        double square = 0;
        for (int64_t i = 0; i < shape_.D; i++) {
            out[i] = float((row[i] - (shape_.cosine ? 0 : packed_->centre[i])) * scale);
            square += double(out[i]) * out[i];
        }
        return square;
    }

    static void offer(void* block, int64_t row, int64_t code, float lower) {
        Block& b = *static_cast<Block*>(block);
        if (lower == INFINITY) return;  // a place without a code, before the row has a threshold
        b.candidates_.add(row, code, lower,
                          lower + b.product_[row] * b.packed_->radius(code) + b.packed_->slack[code] + b.always_[row]);
    }

    void decide(int64_t h, int64_t n, int64_t r) {
        const Header& header = *packed_->header;
        if (candidates_.overflowed(r)) {
            decision_.take(h, n);
            return decision_.scan(h, n);
        }
        candidates_.drop_excluded(r);
        const int64_t unscreened = header.far + (result_.k > 1 ? header.repeats : 0);
        const int32_t count = candidates_.count(r);
        if (!result_.distances && unscreened == 0 && count == 1)
            return decision_.write(h, n, packed_->code[candidates_.code(r, 0)]);
        Ranking ranking(result_.k);
        decision_.take(h, n);
        for (int32_t i = 0; i < count; i++) decision_.consider(h, packed_->code[candidates_.code(r, i)], ranking);
        for (int64_t i = 0; i < unscreened; i++) decision_.consider(h, packed_->code[header.screened + i], ranking);
        decision_.write_decided(h, n, ranking, count == 1 && unscreened == 0);
    }

    const SearchShape& shape_;
    const Rows& x_;
    const RowMask& mask_;
    const SearchResult& result_;
    const Instructions& set_;
    const Packed* packed_ = nullptr;
    const int64_t stride_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<float[]> given_;
    Candidates candidates_;
    Decision decision_;
    int64_t rows_[kMostRows];
    double product_[kMostRows];  // what the upper bound charges for a code's radius
    double always_[kMostRows];   // and whatever the code
};

}  // namespace

void search(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask, const void* memory,
            const SearchResult& result, const Parallel& parallel) {
    if (memory == nullptr) return search_direct(shape, x, codebook, mask, result, parallel);
    const int64_t tile = instructions().tile;
    const int64_t fitting = kBlockBytes / (4 * round_up(shape.D + 1, 16)) / tile * tile;
    const int64_t share = round_up((shape.H * shape.N + parallel.threads - 1) / parallel.threads, tile);
    const int64_t rows = std::max(tile, std::min({kMostRows / tile * tile, fitting, share}));
    const int64_t blocks_a_head = (shape.N + rows - 1) / rows;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> totals[kTiers] = {};
    parallel.over(std::min<int64_t>(parallel.threads, shape.H * blocks_a_head), [&](int64_t, int64_t) {
        const DefaultFloatMode mode;
        Block block(shape, x, codebook, mask, result, rows);
        for (int64_t task; (task = next++) < shape.H * blocks_a_head;) {
            const int64_t h = task / blocks_a_head, begin = task % blocks_a_head * rows;
            const Packed packed(static_cast<const char*>(memory) + h * Packed::bytes(shape.K, shape.D), shape.K, shape.D);
            block.search(h, begin, std::min(begin + rows, shape.N), packed);
        }
        for (int tier = 0; tier < kTiers; tier++) totals[tier] += block.tiers()[tier];
    });
    for (int tier = 0; result.tiers && tier < kTiers; tier++) result.tiers[tier] += totals[tier];
}

}  // namespace vqops
