#include "gather.h"

#include <cmath>

#include "row_buffer.h"

namespace vqops {
namespace {

// Rows [begin, end) of head h, whose indices are known.
void gather(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask, const int64_t* indices,
            const Gathered& result, int64_t h, int64_t begin, int64_t end) {
    const int64_t D = shape.D;
    const bool floats = !result.units && x.has_float_rows() && codebook.has_float_rows();
    AlignedRow given(D), code(D);
    for (int64_t n = begin; n < end; n++) {
        const int64_t row = h * shape.N + n, k = indices[row];
        if (floats && k >= 0) {
            const float* from = codebook.floats(h, k);
            static_cast<float*>(result.error)[row] = float(instructions().exact_distance(x.floats(h, n), from, D));
            std::copy(from, from + D, static_cast<float*>(result.quantized) + row * D);
            continue;
        }
        double distance;
        if (k >= 0) {
            read_row(codebook, h, k, D, code.data);
            read_row(x, h, n, D, given.data);
            if (result.units) given.to_unit(D);
            distance = instructions().exact_cost(given.data, code.data, given.padded, false);
        } else {
            distance = mask.keeps(h, n) ? std::nan("") : 0.0;
            std::fill(code.data, code.data + D, distance);
        }
        write_row(result.quantized, x.dtype, row, D, code.data);
        if (x.dtype == DType::float64) static_cast<double*>(result.error)[row] = distance;
        else static_cast<float*>(result.error)[row] = float(distance);
    }
}

}  // namespace

void search_and_gather(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                       const void* packed, int64_t* indices, const Gathered& result, const Parallel& parallel) {
    const auto follow = [&](int64_t h, int64_t begin, int64_t end) {
        gather(shape, x, codebook, mask, indices, result, h, begin, end);
    };
    search(shape, x, codebook, mask, packed, {indices, 1, nullptr, nullptr}, parallel, follow);
}

}  // namespace vqops
