#include "code_sums.h"

#include "row_buffer.h"
#include "rows.h"

namespace vqops {
namespace {

// Reads rows of one head as the sums take them: float32, of unit length for cosine, times their weight.
class SummedRow {
public:
    SummedRow(const SearchShape& shape, const Rows& x, int64_t h, const Rows* weight)
        : shape_(shape), x_(x), h_(h), weight_(weight), buffer_(shape.D), unit_(shape.D) {}

    const float* operator()(int64_t n) {
        const int64_t D = shape_.D;
        const float* values = buffer_.data();
        if (shape_.cosine) {
            read_row(x_, h_, n, D, unit_.data);
            unit_.to_unit(D);
            for (int64_t i = 0; i < D; i++) buffer_[i] = float(unit_.data[i]);
        } else if (x_.dtype == DType::float64) {
            read_row(x_, h_, n, D, buffer_.data());
        } else {
            values = float_row(x_, h_, n, D, buffer_.data());
        }
        if (!weight_) return values;
        const float factor = read_value<float>(*weight_, h_, n);
        for (int64_t i = 0; i < D; i++) buffer_[i] = values[i] * factor;
        return buffer_.data();
    }

private:
    const SearchShape& shape_;
    const Rows& x_;
    const int64_t h_;
    const Rows* weight_;
    std::vector<float> buffer_;
    AlignedRow unit_;
};

// Reads weights of one head as rows of one dimension.
class WeightRow {
public:
    WeightRow(const Rows& weight, int64_t h) : weight_(weight), h_(h) {}

    const float* operator()(int64_t n) {
        value_ = read_value<float>(weight_, h_, n);
        return &value_;
    }

private:
    const Rows& weight_;
    const int64_t h_;
    float value_ = 0;
};

}  // namespace

int64_t sum_codes(const SearchShape& shape, const Rows& x, const Indices& indices, const Rows* weight,
                  const Sums& result, const Parallel& parallel) {
    const int64_t K = shape.K, D = shape.D;
    std::vector<int64_t> unweighted(weight ? K : 0);
    for (int64_t h = 0; h < shape.H; h++) {
        CodeCounts codes;
        int64_t* counts = weight ? unweighted.data() : static_cast<int64_t*>(result.counts) + h * K;
        const int64_t wrong = codes.count(indices, h, shape.N, counts);
        if (wrong >= 0) return h * shape.N + wrong;
        float* sums = result.sums + h * K * D;
        if (x.has_float_rows() && !shape.cosine && !weight) codes.sum(D, sums, x.floats(h, 0), x.row_stride, parallel);
        else codes.sum(D, sums, [&] { return SummedRow(shape, x, h, weight); }, parallel);
        if (weight)
            codes.sum(1, static_cast<float*>(result.counts) + h * K, [&] { return WeightRow(*weight, h); }, parallel);
    }
    return -1;
}

}  // namespace vqops
