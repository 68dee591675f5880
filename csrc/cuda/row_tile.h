// The rows of a block on their way to the tensor cores: centred, scaled, rounded to float16, with what bounds them.
//
// A row's threads have 8 neighbouring dimensions of each piece: a word of 16 bytes in shared memory, and one or several
// of global memory where rows hold whole ones. A thread has up to 8 words at a time, of as many rows as fill them, all
// asked for before one is used; they stay in registers from the search for the largest element to the rounding. Only
// rows of more words are read twice.
#pragma once

#include <cfloat>

#include "search_inputs.h"

namespace vqops::cuda {

// float64 rows are rounded in float64; all others in float32, which every GPU is fast in.
template <class T>
struct RealOf {
    typedef float type;
    static constexpr float kRounding = 0x1p-23f;  // of x - m, relative to |X|
    static constexpr int kMostPower = 126;
    static constexpr float kLeast = 0x1p-149f, kMost = FLT_MAX;  // of a row's largest element, for cosine

    static VQOPS_HOST_DEVICE int exponent(float value) { return int(bits_of(value) >> 23 & 0xff) - 127; }
    static VQOPS_HOST_DEVICE float power(int exponent) { return float_of(uint32_t(exponent + 127) << 23); }
};
template <>
struct RealOf<double> {
    typedef double type;
    static constexpr float kRounding = 0;  // bound.h has that of float64
    static constexpr int kMostPower = 1000;
    static constexpr double kLeast = 0x1p-400, kMost = 0x1p400;  // else the decision's x.c leaves its range

    static VQOPS_HOST_DEVICE int exponent(double value) { return exponent_of(value); }
    static VQOPS_HOST_DEVICE double power(int exponent) { return power_of_two(exponent); }
};

// The larger of two magnitudes, NaN if one of them is.
VQOPS_HOST_DEVICE double larger(double a, double b) { return a < b || b != b ? b : a; }
VQOPS_HOST_DEVICE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
#else
    return a < b || b != b ? b : a;
#endif
}

// Two neighbours as float16, the first in the lower half.
VQOPS_HOST_DEVICE uint32_t two_halves(float a, float b) {
#ifdef __CUDA_ARCH__
    const __half2 halves = __floats2half2_rn(a, b);
    uint32_t word;
    memcpy(&word, &halves, 4);
    return word;
#else
    return rounded<Float16>(a).bits | uint32_t(rounded<Float16>(b).bits) << 16;
#endif
}

template <class T, class Cores, int kPiece>
struct RowTile {
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows;
    typedef typename RealOf<T>::type Real;
    struct Shared {
        RowBound bound[kRows];
        float unit[kRows];
        State state[kRows];

        // Before a row is bounded: its largest element, and the sums of squares of it and of its error.
        VQOPS_HOST_DEVICE void keep(int r, Real most, float square, float lost) {
            uint32_t halves[2] = {};
            memcpy(halves, &most, sizeof(Real));
            bound[r] = {square, lost, float_of(halves[0])};
            if (sizeof(Real) > 4) unit[r] = float_of(halves[1]);
        }
        VQOPS_HOST_DEVICE Real kept(int r) const {
            const uint32_t halves[2] = {bits_of(bound[r].rest), bits_of(unit[r])};
            Real most;
            memcpy(&most, halves, sizeof(Real));
            return most;
        }
    };

    SearchInputs<T> in;

    VQOPS_HOST_DEVICE int64_t width() const { return padded(in.D); }
    int64_t bytes() const { return kRows * width() * 2; }

    // Row r's dimension i among the block's rows: piece by piece, as the codes are.
    static VQOPS_HOST_DEVICE int place(int r, int i) {
        return i / kPiece * kRows * kPiece + swizzled(r, i % kPiece, kPiece);
    }

    // x: float16 [kRows, width].
    template <class Block>
    VQOPS_HOST_DEVICE void take(Block& block, Shared& shared, const Packed& codes, uint16_t* x, int64_t h,
                                int64_t first) const {
        const Words words = words_of(int(width()) / kPiece);
        const Lift lift = lift_of(codes);
        const bool whole = has_whole_words();
        auto values = block.template registers<Values>();
        auto most = block.template registers<OfWords>(), square = block.template registers<OfWords>();
        auto lost = block.template registers<OfWords>();
        const auto reduce = [&](auto& of_words, const auto& f) {
            block.for_threads([&](int t) { words.reduce(of_words[t].v, f); });
            block.template shuffle_reduce<kRowThreads>(of_words, f);
        };
        for (int top = 0; top < kRows; top += words.rows()) {
            const auto row_of = [&](int t) { return top + t / kRowThreads; };  // of the first word
            block.for_threads([&](int t) { most[t] = square[t] = lost[t] = {}; });
            VQOPS_UNROLL(1)
            for (int pass = 0; pass < 2; pass++) {
                for (int group = 0; group < words.groups; group++) {
                    if (pass == 0 || words.groups > 1)
                        block.for_threads([&](int t) {
                            const uint32_t n = uint32_t(first) + row_of(t);
                            const int i = group * kWords * kPiece + t % kRowThreads * 8;
                            if (whole) read_words<8>(words, codes.centre, h, n, i, values[t]);
                            else read_words<1>(words, codes.centre, h, n, i, values[t]);
                        });
                    if (pass == 0)
                        block.for_threads([&](int t) {
                            VQOPS_UNROLL(8)
                            for (int j = 0; j < kWords; j++) most[t].v[j] = largest(values[t].v[j], most[t].v[j]);
                        });
                    else
                        block.for_threads([&](int t) {
                            uint16_t* const to = x + place(row_of(t), t % kRowThreads * 8);
                            VQOPS_UNROLL(8)
                            for (int j = 0; j < kWords; j++) {
                                const Real power = RealOf<T>::power(lift.exponent(most[t].v[j]));
                                const Word word = round(values[t].v[j], power, square[t].v[j], lost[t].v[j]);
                                const int piece = group * kWords + words.piece(j);
                                if (piece < words.pieces)
                                    *reinterpret_cast<Word*>(to + (piece * kRows + words.row(j)) * kPiece) =
                                        lift.fits(most[t].v[j]) ? word : Word{};
                            }
                        });
                }
                if (pass == 0) reduce(most, [](Real a, Real b) { return larger(a, b); });
            }
            const auto sum = [](Real a, Real b) { return a + b; };
            reduce(square, sum);
            reduce(lost, sum);
            block.for_threads([&](int t) {
                if (t % kRowThreads != 0) return;
                VQOPS_UNROLL(8)
                for (int j = 0; j < kWords; j++)
                    shared.keep(row_of(t) + words.row(j), most[t].v[j], float(square[t].v[j]), float(lost[t].v[j]));
            });
        }
        block.for_threads_sync([](int) {});
        block.for_threads([&](int t) {
            if (t >= kRows) return;
            bound_row(shared, t, first + t < in.N && in.mask.keeps(h, first + t), lift, codes);
        });
    }

private:
    static constexpr int kRowThreads = kPiece / 8;            // of a row
    static constexpr int kTogether = kThreads / kRowThreads;  // rows
    static constexpr int kRounds = kRows / kTogether;
    // Words of a thread at a time: 64 registers, or 32 where blocks, or a loader beside two row tiles, leave fewer.
    static constexpr bool kMany = Cores::kWarpgroups && !(Cores::kLoader && Cores::kRowTiles == 2);
    static constexpr int kMostWords = (kMany ? 8 : 4) * 4 / int(sizeof(Real));
    static constexpr int kWords = Cores::kWarpgroups || kRounds > kMostWords ? kMostWords : kRounds;
    static_assert(kRows <= kThreads && kTogether % 8 == 0);  // a swizzle repeats every 8 rows
    static_assert(sizeof(Real) == 8 || kPiece < 64 || kWords >= 4);  // else chains in bound_row are longer

    typedef Many<Real, kWords> OfWords;
    struct Values {
        Real v[kWords][8];
    };
    struct alignas(16) Word {
        uint32_t v[4];
    };

    // A thread's words: 2^log of a row, in turn, of every kTogether-th row; more in several groups.
    struct Words {
        int pieces, log, groups;

        VQOPS_HOST_DEVICE int rows() const { return kWords * kTogether >> log; }
        VQOPS_HOST_DEVICE int row(int j) const { return (j >> log) * kTogether; }
        VQOPS_HOST_DEVICE int piece(int j) const { return j & ((1 << log) - 1); }
        // Of each row's words what f makes of all of them.
        template <class F>
        VQOPS_HOST_DEVICE void reduce(Real* v, const F& f) const {
            VQOPS_UNROLL(3)
            for (int bit = 0; 1 << bit < kWords; bit++) {
                if (bit >= log) continue;
                VQOPS_UNROLL(8)
                for (int j = 0; j < kWords; j++)
                    if ((j >> bit & 1) == 0) v[j] = v[j | 1 << bit] = f(v[j], v[j | 1 << bit]);
            }
        }
    };
    static VQOPS_HOST_DEVICE Words words_of(int pieces) {
        if (kPiece < 64) return {1, 0, 1};
        int log = 0;
        VQOPS_UNROLL(3)
        for (int most = 1; most < kWords; most *= 2) log += pieces > most || kWords > kRounds * most;
        return {pieces, log, (pieces + kWords - 1) / kWords};
    }

    // The power of two that brings a row's largest element to [2^14, 2^15). A cosine does not change with it.
    struct Lift {
        bool cosine;
        Real scale;
        int of_scale, least;  // exponents
        Real from, to;        // of a row's largest element

        VQOPS_HOST_DEVICE bool fits(Real most) const { return most * scale >= from && most * scale <= to; }
        VQOPS_HOST_DEVICE int exponent(Real most) const {
            const int found = RealOf<T>::exponent(most * scale);
            const int power = 14 - (found > least ? found : least) + of_scale;
            return power < RealOf<T>::kMostPower ? power : RealOf<T>::kMostPower;
        }
        VQOPS_HOST_DEVICE float unit(Real most) const {
            return RealOf<float>::power(cosine ? -14 : of_scale - exponent(most));
        }
    };
    VQOPS_HOST_DEVICE Lift lift_of(const Packed& codes) const {
        typedef RealOf<T> Of;
        if (in.cosine) return {true, 1, 0, -2000, Of::kLeast, Of::kMost};
        return {false, *codes.scale, RealOf<float>::exponent(*codes.scale), kSmallestExponent, 0, Real(kFarRow)};
    }

    // Whether rows are whole words, at multiples of 16 bytes.
    VQOPS_HOST_DEVICE bool has_whole_words() const {
        const uint64_t strides = uint64_t(in.x.row_stride) | uint64_t(in.x.head_stride);
        return in.x.stride == 1 && in.D % 8 == 0 &&
               (reinterpret_cast<uintptr_t>(in.x.data) | strides * sizeof(T)) % 16 == 0;
    }

    // A thread's words, centred, from dimension i of row n of a head; 0 beyond the dimensions, and the last row in the
    // place of rows beyond it. All are asked for before one is used. kPart: elements of a load.
    template <int kPart>
    VQOPS_HOST_DEVICE void read_words(const Words& words, const float* centre, int64_t h, uint32_t n, int i,
                                      Values& values) const {
        struct alignas(kPart > 1 ? 16 : sizeof(T)) Part {
            T v[kPart];
        };
        struct alignas(kPart > 1 ? 16 : 4) Centre {
            float v[kPart];
        };
        const int64_t stride = kPart > 1 ? 1 : in.x.stride;
        const T* const from = in.x.data + (in.x.offset(h, 0) + i * stride);
        const uint32_t last = uint32_t(in.N) - 1;
        const int left = int(in.D) - i;
        VQOPS_UNROLL(8)
        for (int j = 0; j < kWords; j++) {
            const uint32_t row = n + words.row(j) < last ? n + words.row(j) : last;
            const T* word = from + (row * in.x.row_stride + words.piece(j) * kPiece * stride);
            VQOPS_UNROLL(8)
            for (int e = 0; e < 8; e += kPart, word += stride) {
                const bool exists = words.piece(j) * kPiece + e < left;
                const Part part = exists ? *reinterpret_cast<const Part*>(word) : Part{};
                VQOPS_UNROLL(8)
                for (int k = 0; k < kPart; k++) values.v[j][e + k] = real(part.v[k]);
            }
        }
        if (in.cosine) return;
        VQOPS_UNROLL(8)
        for (int j = 0; j < kWords; j++) {
            const float* const word = centre + (i + words.piece(j) * kPiece);
            VQOPS_UNROLL(8)
            for (int e = 0; e < 8; e += kPart) {
                const bool exists = words.piece(j) * kPiece + e < left;
                const Centre part = exists ? *reinterpret_cast<const Centre*>(word + e) : Centre{};
                VQOPS_UNROLL(8)
                for (int k = 0; k < kPart; k++) values.v[j][e + k] -= Real(part.v[k]);
            }
        }
    }

    static VQOPS_HOST_DEVICE Real largest(const Real* values, Real most) {
        VQOPS_UNROLL(8)
        for (int e = 0; e < 8; e++) most = larger(most, std::fabs(values[e]));
        return most;
    }

    // Elements times a power of two as float16; what they and their rounding add to sums of squares.
    static VQOPS_HOST_DEVICE Word round(const Real* values, Real power, Real& square, Real& lost) {
        Word word;
        VQOPS_UNROLL(4)
        for (int e = 0; e < 8; e += 2) {
            const Real a = values[e] * power, b = values[e + 1] * power;
            const uint32_t two = word.v[e / 2] = two_halves(float(a), float(b));
            const Real of_a = a - Real(real(Float16{uint16_t(two)}));
            const Real of_b = b - Real(real(Float16{uint16_t(two >> 16)}));
            square = std::fma(a, a, std::fma(b, b, square)), lost = std::fma(of_a, of_a, std::fma(of_b, of_b, lost));
        }
        return word;
    }

    // Row bounds, and the state: a row is searched if its elements are finite and the bounds hold for it. The sums of
    // squares are of float32, chains of at most D / 32 + 14 roundings: exactness.md.
    VQOPS_HOST_DEVICE void bound_row(Shared& shared, int r, bool exists, const Lift& lift, const Packed& codes) const {
        const Real most = shared.kept(r);
        const float square = shared.bound[r].radius, lost = shared.bound[r].spread;
        const float unit = lift.fits(most) ? lift.unit(most) : 0;
        const float upward = unit * (1 + float(int(in.D) / 32 + 5) * 0x1p-23f), norm = std::sqrt(square) * upward;
        const float error = std::sqrt(lost) * upward + norm * RealOf<T>::kRounding;
        const bool searched = exists && unit > 0 && norm <= float(kFarRow) && codes.reaches(norm);
        shared.state[r] = searched ? kSearched : !exists ? kOutside : in.cosine && most == 0 ? kZero : kQueued;
        shared.unit[r] = searched ? unit : 0;
        shared.bound[r] = searched ? row_bound(norm, error, *codes.worst, in.D, in.cosine) : RowBound{};
    }
};

}  // namespace vqops::cuda
