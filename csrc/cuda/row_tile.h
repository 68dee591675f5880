// The rows of a block on their way to the tensor cores: centred, scaled, rounded to float16, with what bounds them.
#pragma once

#include "search_inputs.h"

namespace vqops::cuda {

// float64 rows are rounded in float64; all others in float32, which every GPU is fast in.
template <class T>
struct RealOf {
    typedef float type;
    static constexpr double kRounding = 0x1p-23;  // of x - m, relative to |X|
    static constexpr int kMostShift = 126;
    static constexpr double kLeast = 0, kMost = HUGE_VAL;  // of a row's largest element, for cosine
};
template <>
struct RealOf<double> {
    typedef double type;
    static constexpr double kRounding = 0;  // bound.h has that of float64
    static constexpr int kMostShift = 1000;
    static constexpr double kLeast = 0x1p-400, kMost = 0x1p400;  // else the decision's x.c leaves its range
};

template <class T, class Cores, int kPiece>
struct RowTile {
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows;
    typedef typename RealOf<T>::type Real;
    struct Shared {
        RowBound bound[kRows];
        float unit[kRows];
        State state[kRows];
    };

    SearchInputs<T> in;

    VQOPS_HOST_DEVICE int64_t width() const { return padded(in.D); }
    int64_t bytes() const { return kRows * width() * 2; }

    // Row r's dimension i among the block's rows: piece by piece, as the codes are.
    static VQOPS_HOST_DEVICE int place(int r, int i) {
        return i / kPiece * kRows * kPiece + swizzled(r, i % kPiece, kPiece);
    }

    // x: float16 [kRows, width]. Eight threads per row, which read it twice, the second time from cache.
    template <class Block>
    VQOPS_HOST_DEVICE void take(Block& block, Shared& shared, const Packed& codes, uint16_t* x, int64_t h,
                                int64_t first) const {
        auto most = block.template registers<Real>(), zero = block.template registers<Real>();
        auto square = block.template registers<Real>(), lost = block.template registers<Real>();
        for (int top = 0; top < kRows; top += kThreads / kLanes) {
            const auto row_of = [&](int t) { return top + t / kLanes; };
            const auto exists = [&](int t) { return first + row_of(t) < in.N && in.mask.keeps(h, first + row_of(t)); };
            const auto value = [&](int t, int64_t i) {
                const Real given = in.x.at(in.x.offset(h, first + row_of(t)), i);
                return in.cosine ? given : (given - Real(codes.centre[i])) * Real(*codes.scale);
            };
            block.for_threads([&](int t) {
                most[t] = zero[t] = 0;
                if (!exists(t)) return;
                VQOPS_UNROLL(8)
                for (int64_t i = t % kLanes; i < in.D; i += kLanes) {
                    const Real v = value(t, i);
                    most[t] = std::fmax(most[t], std::fabs(v)), zero[t] += 0 * v;
                }
            });
            block.template shuffle_reduce<kLanes>(most, [](Real a, Real b) { return std::fmax(a, b); });
            block.template shuffle_sum<kLanes>(zero);
            // The power of two that brings the largest element to [2^14, 2^15). A cosine does not change with it.
            const auto shift = [&](int t) {
                const int exponent = exponent_of(most[t]), most_shift = RealOf<T>::kMostShift;
                if (!in.cosine) return 14 - (exponent > kSmallestExponent ? exponent : kSmallestExponent);
                return exponent < 14 - most_shift ? most_shift : 14 - exponent;
            };
            const auto is_zero = [&](int t) { return exists(t) && in.cosine && zero[t] == 0 && most[t] == 0; };
            const auto fits = [&](int t) {
                if (!exists(t) || zero[t] != 0 || is_zero(t)) return false;
                return in.cosine ? most[t] >= RealOf<T>::kLeast && most[t] <= RealOf<T>::kMost : most[t] <= kFarRow;
            };
            block.for_threads([&](int t) {
                const Real lift = fits(t) ? Real(power_of_two(shift(t))) : 0;
                square[t] = lost[t] = 0;
                VQOPS_UNROLL(8)
                for (int64_t i = t % kLanes; i < width(); i += kLanes) {
                    const Real y = lift != 0 && i < in.D ? value(t, i) * lift : 0;
                    const Float16 half = rounded<Float16>(y);
                    const Real e = y - Real(real(half));
                    square[t] += y * y, lost[t] += e * e;
                    x[place(row_of(t), int(i))] = half.bits;
                }
            });
            block.template shuffle_sum<kLanes>(square);
            block.template shuffle_sum<kLanes>(lost);
            block.for_threads([&](int t) {
                if (t % kLanes != 0) return;
                const int r = row_of(t);
                const double unit = in.cosine ? 0x1p-14 : power_of_two(fits(t) ? -shift(t) : 0);
                const double upward = unit * (1 + double(in.D + 64) * 0x1p-28);  // the sums are of 24 bits
                const double norm = std::sqrt(double(square[t])) * upward;
                const double error = std::sqrt(double(lost[t])) * upward + norm * RealOf<T>::kRounding;
                const bool searched = fits(t) && norm <= kFarRow && codes.reaches(norm);
                shared.state[r] = searched ? kSearched : is_zero(t) ? kZero : exists(t) ? kQueued : kOutside;
                shared.unit[r] = searched ? float(unit) : 0;
                shared.bound[r] = searched ? row_bound(norm, error, *codes.worst, in.D, in.cosine) : RowBound{};
            });
        }
    }
};

}  // namespace vqops::cuda
