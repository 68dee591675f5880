// Sample: the code of the largest key l + T g of each row. A block of rows passes all panels of codes as in screen.h; a
// thread takes the next block when it is done.
//
// The product gives lower bounds L of half the squared distance (docs/exactness.md); the random word of a pair bounds
// its noise from above with two conversions and a product. In the units of the codes, of distances s |x - c|,
//   key <= N - sqrt(|X|^2 + 2 (L - e)),  N = most - step bits,  e <= rest
//   cosine, in units of |X|:  key <= N + X.m + e - L, where m is the centre
// A pair is looked at where this reaches the threshold, the largest key so far: its key is computed in float64 at once,
// with the logarithm of noise.h, so neither lists nor lower bounds of keys are needed. About 2 log K pairs of a row
// are. What float32 rounds on the way, six times at most 2^-24 (|threshold| + 110 T), is in the threshold, 2^-21 (|key|
// + 128 T) below the key; 2^-12 T of N covers the rounding of the bits. |X|^2 is summed in float32, hence less
// (D + 8) 2^-23 of itself. Far codes are looked at for every row; rows beyond the bounds' range, with all codes.

#include "sample.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../noise.h"
#include "codebook.h"
#include "decide.h"
#include "screen.h"

namespace vqops {
namespace {

constexpr double kLargestTemperature = 0x1p60, kLeastTemperature = 0x1p-60;  // of bounds, in the units of the codes
constexpr float kNoKey = -0x1p63f;  // below every key of a row that has bounds

struct Task {
    const SearchShape& shape;
    const Rows& x;
    const Rows& codebook;
    const RowMask& mask;
    double temperature;
    uint64_t key, offset;
    int64_t* indices;
};

// The panels of a head.
struct Head {
    Head(const Task& task, int64_t h, const Parallel& parallel)
        : places(places_of(task.shape.K)), held(Packed::bytes(places, task.shape.D, drawing_instructions())),
          packed(held.data, places, task.shape.D) {
        pack_fours(task.codebook, h, task.shape.K, task.shape.D, task.shape.cosine, packed.header, far, parallel);
    }

    int64_t places;
    CacheLines held;
    Packed packed;
    std::vector<int32_t> far;
};

// The largest keys of rows, in float64.
class Keys {
public:
    Keys(const Task& task, int64_t h) : x(task.shape.D), task_(task), h_(h), code_(task.shape.D) {}

    void read(int64_t n) {
        if (n == n_) return;
        n_ = n;
        read_row(task_.x, h_, n, task_.shape.D, x.data);
        norm = task_.shape.cosine ? std::sqrt(x.dot(x)) : 0;
    }

    // A finite code and the row that was read.
    void consider(int64_t k, Drawn& best) {
        const SearchShape& shape = task_.shape;
        if (floats_) {
            cost_ = set_.exact_distance(task_.x.floats(h_, n_), task_.codebook.floats(h_, k), shape.D);
        } else {
            read_row(task_.codebook, h_, k, shape.D, code_.data);
            cost_ = set_.exact_cost(x.data, code_.data, x.padded, shape.cosine);
        }
        uint32_t words[4];
        philox(task_.key, task_.offset + uint64_t(n_), uint32_t(k / 4), uint32_t(h_), words);
        const double noise = task_.temperature * gumbel(words[k % 4]);
        const Drawn drawn = {logit_of(cost_, norm, shape.cosine) + noise, cost_, k};
        if (drawn.before(best)) best = drawn;
    }

    int64_t scan(Drawn best) {
        for (int64_t k = 0; k < task_.shape.K; k++) {
            read_row(task_.codebook, h_, k, task_.shape.D, code_.data);
            if (code_.finite()) consider(k, best);
        }
        return best.index;
    }

    AlignedRow x;
    double norm = 0;

private:
    const Task& task_;
    const int64_t h_;
    const Instructions& set_ = instructions();
    AlignedRow code_;
    double cost_ = 0;
    int64_t n_ = -1;
    const bool floats_ = !task_.shape.cosine && task_.x.has_float_rows() && task_.codebook.has_float_rows();
};

// One thread's blocks of a head.
class Block {
public:
    Block(const Task& task, int64_t h, const Head& head, int64_t rows)
        : task_(task), h_(h), head_(head), header_(*head.packed.header),
          block_(rows * set_.row_bytes(task.shape.D)), values_(new float[task.shape.D]),
          zeros_(new float[task.shape.D]()), noise_(new float[rows * 4 * set_.lanes]), offset_(rows), step_(rows),
          most_(rows), threshold_(rows), unit_(rows), number_(rows), row_(rows), best_(rows), keys_(task, h) {
        std::fill_n(block_.data, rows * set_.row_bytes(task.shape.D), 0);
    }

    void run(int64_t begin, int64_t end) {
        int64_t count = 0;
        for (int64_t n = begin; n < end; n++) {
            if (!task_.mask.keeps(h_, n)) write(n, -1);
            else if (place(n, count)) count++;
            else settle(n);
        }
        if (count == 0) return;
        const int64_t padded = round_up(count, set_.tile);
        for (int64_t r = count; r < padded; r++) threshold_[r] = NAN;
        const Draws draws = {offset_.data(), step_.data(),      most_.data(), number_.data(), threshold_.data(),
                             task_.key,      uint32_t(h_),      task_.shape.cosine, noise_.get(), this, consider};
        set_.draw(block_.data, padded, head_.packed.as_read(set_), draws);
        for (int64_t r = 0; r < count; r++) {
            if (!head_.far.empty()) keys_.read(row_[r]);
            for (const int32_t k : head_.far) keys_.consider(k, best_[r]);
            write(row_[r], best_[r].index);
        }
    }

private:
    // Puts row n in place r of the block, with the constants of its bounds. False: no bound covers it.
    bool place(int64_t n, int64_t r) {
        const SearchShape& shape = task_.shape;
        const bool cosine = shape.cosine, given = !cosine && task_.x.dtype != DType::float64;
        const float* vector = values_.get();
        double scale = header_.scale, length = 1, middle = 0;
        if (given) {
            vector = float_row(task_.x, h_, n, shape.D, values_.get());
        } else {
            keys_.read(n);
            const double* row = keys_.x.data;
            if (cosine) {
                scale = unit_scale(row, shape.D);
                if (!stays_in_range(scale)) return false;
                if (keys_.norm > 0) length = keys_.norm * scale;  // x = 0 has logits of 0, in any unit
                middle = scale * product_above(row, head_.packed.centre, shape.D);
            }
            for (int64_t i = 0; i < shape.D; i++)
                values_[i] = float((row[i] - (cosine ? 0 : head_.packed.centre[i])) * scale);
        }
        RowNorm norm;
        const float* centre = given ? head_.packed.centre : zeros_.get();
        set_.place_rows({&vector, 1, shape.D, centre, given ? header_.scale : 1}, r, block_.data, &norm);
        unit_[r] = cosine ? length : scale;
        const double temperature = task_.temperature * unit_[r];
        if (!(norm.square <= kFarRow * kFarRow && shape.D <= kDeepest && temperature <= kLargestTemperature))
            return false;
        const double rest = rest_of(norm.at_least, header_);
        const double square = double(norm.square) * (1 - double(shape.D + 8) * 0x1p-23) - 2 * rest;
        offset_[r] = cosine ? std::nextafter(float(rest + middle), INFINITY) : std::nextafter(float(square), -INFINITY);
        const NoiseBound bound(std::max(temperature, kLeastTemperature));
        step_[r] = bound.step, most_[r] = bound.most;
        number_[r] = task_.offset + uint64_t(n);
        threshold_[r] = kNoKey;
        row_[r] = n;
        best_[r] = {0, 0, -1};
        return true;
    }

    // x.m from above, also where it is added in float32.
    static double product_above(const double* x, const float* centre, int64_t D) {
        double sum = 0, size = 0;
        for (int64_t i = 0; i < D; i++) sum += x[i] * centre[i], size += std::fabs(x[i] * centre[i]);
        return sum + 0x1p-21 * size;
    }

    void settle(int64_t n) {
        keys_.read(n);
        write(n, keys_.x.finite() ? keys_.scan({0, 0, -1}) : -1);
    }

    static void consider(void* self, int64_t r, int64_t place) {
        Block& block = *static_cast<Block*>(self);
        Drawn& best = block.best_[r];
        block.keys_.read(block.row_[r]);
        block.keys_.consider(block.head_.packed.code[place], best);
        const double key = best.key * block.unit_[r];
        const double below = 0x1p-21 * (std::fabs(key) + 128 * block.task_.temperature * block.unit_[r]) + 0x1p-54;
        block.threshold_[r] = std::nextafter(float(key - below), -INFINITY);
    }

    void write(int64_t n, int64_t index) { task_.indices[h_ * task_.shape.N + n] = index; }

    const Task& task_;
    const int64_t h_;
    const Head& head_;
    const Header& header_;
    const Instructions& set_ = drawing_instructions();
    const CacheLines block_;
    std::unique_ptr<float[]> values_, zeros_, noise_;
    std::vector<float> offset_, step_, most_, threshold_;
    std::vector<double> unit_;  // of a row's keys
    std::vector<uint64_t> number_;
    std::vector<int64_t> row_;
    std::vector<Drawn> best_;
    Keys keys_;
};

}  // namespace

void draw_codes(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                double temperature, const int64_t* seed, int64_t* indices, const Parallel& parallel) {
    const Task task = {shape, x, codebook, mask, temperature, uint64_t(seed[0]), uint64_t(seed[1]), indices};
    const int64_t share = (shape.N + parallel.threads - 1) / parallel.threads;
    const int64_t rows = rows_of_block(drawing_instructions(), shape.D, share);
    const int64_t blocks = (shape.N + rows - 1) / rows;
    for (int64_t h = 0; blocks > 0 && h < shape.H; h++) {
        const DefaultFloatMode mode_of_packing;
        const Head head(task, h, parallel);
        std::atomic<int64_t> next{0};
        parallel.over(std::min<int64_t>(parallel.threads, blocks), [&](int64_t, int64_t) {
            const DefaultFloatMode mode;
            Block block(task, h, head, rows);
            for (int64_t b; (b = next++) < blocks;) block.run(b * rows, std::min((b + 1) * rows, shape.N));
        });
    }
}

}  // namespace vqops
