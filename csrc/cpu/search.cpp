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
#include <cmath>
#include <memory>
#include <vector>

#include "codebook.h"
#include "row_buffer.h"

namespace vqops {
namespace {

constexpr int64_t kMostRows = 96;           // 16 tiles of six share a panel; more did not pay
constexpr int64_t kBlockBytes = 96 * 1024;  // a fraction of any second cache
constexpr float kFarRow = 0x1p60f;          // rows beyond could overflow float32 in a product with a code
constexpr int64_t kDeepest = 1 << 17;       // the bound's constants hold up to here

// The candidates of a block's rows.
class Lists {
public:
    explicit Lists(int64_t k)
        : k_(int32_t(k)), capacity_(30 + 2 * k_), code_(kMostRows * capacity_), lower_(kMostRows * capacity_),
          least_(k > 1 ? kMostRows * k : 0) {}

    void start(int64_t row) {
        threshold[row] = INFINITY;
        count_[row] = 0;
        if (k_ > 1) std::fill_n(&least_[row * k_], k_, INFINITY);
    }

    bool overflowed(int64_t row) const { return count_[row] > capacity_; }
    int32_t count(int64_t row) const { return count_[row]; }
    int32_t code(int64_t row, int32_t i) const { return code_[row * capacity_ + i]; }

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

    static void add(void* lists, int64_t row, int64_t code, float lower) {
        static_cast<Lists*>(lists)->add(row, code, lower);
    }

    const Packed* packed = nullptr;
    float threshold[kMostRows];  // k-th least upper bound so far; -inf takes no more candidates
    double product[kMostRows];   // what the bound charges for a code's radius
    double always[kMostRows];    // and whatever the code

private:
    void add(int64_t row, int64_t code, float lower) {
        const double upper = lower + product[row] * packed->radius(code) + packed->slack[code] + always[row];
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

    void lower_threshold(int64_t row, float upper) {
        if (upper >= threshold[row]) return;
        if (k_ > 1) {
            float* least = &least_[row * k_];
            int32_t i = k_ - 1;
            for (; i > 0 && least[i - 1] > upper; i--) least[i] = least[i - 1];
            least[i] = upper;
            upper = least[k_ - 1];
        }
        threshold[row] = upper;
    }

    const int32_t k_, capacity_;  // clustered or random data leaves 1 to 3 candidates beside the k
    int32_t count_[kMostRows];    // capacity + 1: too many to hold
    std::vector<int32_t> code_;
    std::vector<float> lower_, least_;
};

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

// One thread's workspace for blocks of one shape.
class Block {
public:
    Block(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
          const SearchResult& result, int64_t rows)
        : shape_(shape), x_(x), codebook_(codebook), mask_(mask), result_(result), set_(instructions()),
          stride_(round_up(shape.D + 1, 16)), values_(new float[rows * stride_]), given_(new float[shape.D]),
          exact_x_(shape.D), exact_c_(shape.D), lists_(new Lists(result.k)) {}

    void search(int64_t h, int64_t begin, int64_t end, const Packed& packed) {
        lists_->packed = &packed;
        int64_t screened = 0;
        for (int64_t n = begin; n < end; n++) {
            const Row row = take(h, n, screened, packed);
            if (row == Row::screen) rows_[screened++] = n;
            else if (row == Row::scan) scan(h, n);
            else if (row == Row::zero) write(h, n, packed.header->first);
            else tiers[kNoCode]++, write(h, n, Ranking(result_.k), row == Row::lost ? NAN : INFINITY);
        }
        const int64_t padded = round_up(screened, set_.tile);
        for (int64_t r = screened; r < padded; r++) {
            std::fill_n(values_.get() + r * stride_, stride_, 0.0f);
            lists_->threshold[r] = -INFINITY;
        }
        set_.screen(values_.get(), padded, stride_, packed.panels, packed.panel_count(), packed.depth(), packed.start,
                    lists_->threshold, {lists_.get(), Lists::add});
        for (int64_t r = 0; r < screened; r++) decide(h, rows_[r], r, packed);
    }

    int64_t tiers[kTiers] = {};

private:
    enum class Row { masked, lost, zero, screen, scan };

    // Centre row n into place r, with the constants of its bound.
    Row take(int64_t h, int64_t n, int64_t r, const Packed& packed) {
        if (!mask_.keeps(h, n)) return Row::masked;
        const int64_t D = shape_.D;
        float* out = values_.get() + r * stride_;
        double square;
        if (shape_.cosine || x_.dtype == DType::float64) {
            square = take_double(h, n, packed, out);
        } else {
            const float* row = float_row(x_, h, n, D, given_.get());
            square = set_.centre_row(row, packed.centre, packed.header->scale, D, out);
        }
        if (shape_.cosine && square == 0 && !result_.distances && packed.header->first >= 0) return Row::zero;  // scores 0 with every code
        if (!(square <= double(kFarRow) * kFarRow) || D > kDeepest) {
            read_row(x_, h, n, D, exact_x_.data);
            return exact_x_.finite() ? Row::scan : Row::lost;
        }
        // exactness.md: |x'| rounded up, the coefficient of |x'| |c'|, and the terms that no code changes.
        const double norm = std::sqrt(square) * (1 + 1e-5 + double(D) * 0x1p-23) + double(D) * 0x1p-70;
        const double coefficient = 1.02 * double(D + 5) * 0x1p-24;
        const double decision = packed.header->decision * (shape_.cosine ? norm : norm * norm);
        out[D] = std::nextafter(float(coefficient * norm), INFINITY);
        lists_->product[r] = 2.02 * out[D];
        lists_->always[r] = 2 * (decision + 0x1p-120 * double(D) * (1 + norm));
        lists_->start(r);
        return Row::screen;
    }

    // Through float64, for float64 rows and for cosine, where a power of two brings each row to about norm 1.
    double take_double(int64_t h, int64_t n, const Packed& packed, float* out) {
        const int64_t D = shape_.D;
        double* row = exact_x_.data;
        read_row(x_, h, n, D, row);
        double scale = packed.header->scale;
        if (shape_.cosine) {
            double largest = 0;
            for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::fabs(row[i]));
            scale = largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, std::min(-std::ilogb(largest), 1000)) : 1;
        }
        double square = 0;
        for (int64_t i = 0; i < D; i++) {
            out[i] = float((row[i] - (shape_.cosine ? 0 : packed.centre[i])) * scale);
            square += double(out[i]) * out[i];
        }
        return square;
    }

    void decide(int64_t h, int64_t n, int64_t r, const Packed& packed) {
        if (lists_->overflowed(r)) {
            read_row(x_, h, n, shape_.D, exact_x_.data);
            return scan(h, n);
        }
        lists_->drop_excluded(r);
        const int64_t unscreened = packed.header->far + (result_.k > 1 ? packed.header->repeats : 0);
        const int32_t count = lists_->count(r);
        if (!result_.distances && unscreened == 0 && count == 1) return write(h, n, packed.code[lists_->code(r, 0)]);
        Ranking ranking(result_.k);
        read_row(x_, h, n, shape_.D, exact_x_.data);
        for (int32_t i = 0; i < count; i++) consider(h, packed.code[lists_->code(r, i)], ranking);
        for (int64_t i = 0; i < unscreened; i++) consider(h, packed.code[packed.header->screened + i], ranking);
        tiers[ranking.size ? kDecided : kNoCode]++;
        write(h, n, ranking, INFINITY);
    }

    // Compares every code in float64; x is in exact_x_.
    void scan(int64_t h, int64_t n) {
        Ranking ranking(result_.k);
        for (int64_t k = 0; k < shape_.K; k++) consider(h, k, ranking);
        tiers[ranking.size ? kScanned : kNoCode]++;
        write(h, n, ranking, INFINITY);
    }

    void consider(int64_t h, int64_t k, Ranking& ranking) {
        read_row(codebook_, h, k, shape_.D, exact_c_.data);
        if (!exact_c_.finite()) return;
        ranking.add(set_.exact_cost(exact_x_.data, exact_c_.data, exact_x_.padded, shape_.cosine), k);
    }

    // A certified row of a search for one code.
    void write(int64_t h, int64_t n, int64_t index) {
        tiers[kCertified]++;
        result_.indices[h * shape_.N + n] = index;
    }

    void write(int64_t h, int64_t n, const Ranking& ranking, float missing) {
        const int64_t start = (h * shape_.N + n) * result_.k;
        const double square = shape_.cosine && result_.distances && ranking.size ? exact_x_.dot(exact_x_) : 0;
        for (int64_t i = 0; i < result_.k; i++) {
            const bool found = i < ranking.size;
            result_.indices[start + i] = found ? ranking.index[i] : -1;
            if (!result_.distances) continue;
            double distance = found ? ranking.cost[i] : missing;
            if (found && shape_.cosine) distance = 1 + (square > 0 ? distance / std::sqrt(square) : 0);
            if (x_.dtype == DType::float64) static_cast<double*>(result_.distances)[start + i] = distance;
            else static_cast<float*>(result_.distances)[start + i] = float(distance);
        }
    }

    const SearchShape& shape_;
    const Rows& x_;
    const Rows& codebook_;
    const RowMask& mask_;
    const SearchResult& result_;
    const Instructions& set_;
    const int64_t stride_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<float[]> given_;
    AlignedRow exact_x_, exact_c_;
    std::unique_ptr<Lists> lists_;
    int64_t rows_[kMostRows];
};

}  // namespace

void search(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask, const void* memory,
            const SearchResult& result, const Parallel& parallel) {
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
        for (int tier = 0; tier < kTiers; tier++) totals[tier] += block.tiers[tier];
    });
    for (int tier = 0; result.tiers && tier < kTiers; tier++) result.tiers[tier] += totals[tier];
}

}  // namespace vqops
