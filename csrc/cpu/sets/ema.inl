// The rows of an EMA update (csrc/cpu/ema.cpp). Included by kernels.inl.

// Vectors of eight floats at most: those of sixteen divide no faster, and eight dimensions are common.
template <class Set, bool wide = (Set::kWidth > 8)>
struct RowVectors : Set {};

template <class Set>
struct RowVectors<Set, true> {
    static constexpr int kWidth = 8;
    typedef float Vector __attribute__((vector_size(32)));
    typedef float UnalignedVector __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int32_t Whole __attribute__((vector_size(32)));
};

template <class Set>
struct Averaging {
    typedef typename RowVectors<Set>::Vector Vector;
    typedef typename RowVectors<Set>::UnalignedVector UnalignedVector;
    typedef typename RowVectors<Set>::Whole Whole;
    static constexpr int kWidth = RowVectors<Set>::kWidth;

    // What a row consists of: vectors, and single values behind them.
    struct Vectors {
        VQOPS_INLINE Vector get(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
        VQOPS_INLINE void put(float* p, Vector v) { *reinterpret_cast<UnalignedVector*>(p) = v; }
    };
    struct Values {
        VQOPS_INLINE float get(const float* p) { return *p; }
        VQOPS_INLINE void put(float* p, float v) { *p = v; }
    };
    template <class Body>
    VQOPS_INLINE void over(int64_t D, const Body& body) {
        int64_t i = 0;
        for (; i + kWidth <= D; i += kWidth) body(Vectors(), i);
        for (; i < D; i++) body(Values(), i);
    }

    // lerp of ema_step.h; `half`: of a step below one half.
    template <bool half, class T>
    VQOPS_INLINE T moved(T from, T to, float step) {
        return half ? from + step * (to - from) : to - (to - from) * (1 - step);
    }

    template <class T>
    VQOPS_INLINE T larger(T a, T b) {
        return a > b ? a : b;
    }

    // The largest magnitude of value(part, i), or one that is not finite: the bits of floats stand in the order of their
    // magnitudes, and Inf and NaN above all others.
    template <class Value>
    VQOPS_INLINE float largest_of(int64_t D, const Value& value) {
        Whole most = {};
        int32_t last = 0;
        int64_t i = 0;
        for (; i + kWidth <= D; i += kWidth) {
            const Whole bits = Whole(value(Vectors(), i)) & 0x7fffffff;
            most = larger(most, bits);
        }
        for (; i < D; i++) {
            const int32_t bits = __builtin_bit_cast(int32_t, value(Values(), i)) & 0x7fffffff;
            last = larger(last, bits);
        }
        typedef Whole Mask;
        if constexpr (kWidth == 8) {
            most = larger(most, VQOPS_SHUFFLE(most, most, 4, 5, 6, 7, 0, 1, 2, 3));
            most = larger(most, VQOPS_SHUFFLE(most, most, 2, 3, 0, 1, 6, 7, 4, 5));
        } else {
            most = larger(most, VQOPS_SHUFFLE(most, most, 2, 3, 0, 1));
        }
        return __builtin_bit_cast(float, larger(larger(most[0], most[1]), last));
    }

    VQOPS_INLINE bool finite(float value) { return value - value == 0; }

    // Returns the largest magnitude of the code's averages.
    template <bool half>
    VQOPS_INLINE float move_average(const EmaHead& head, int64_t k, float step) {
        const int64_t D = head.D;
        float* average = head.average + k * D;
        const float* sums = head.sums + k * D;
        const auto next = [&](auto part, int64_t i) __attribute__((always_inline)) {
            return moved<half>(part.get(average + i), part.get(sums + i), step);
        };
        const float count = head.counts ? float(head.counts[k]) : head.weighted_counts[k];
        const float size = moved<half>(head.size[k], count, step), largest = largest_of(D, next);
        if (!finite(size) || !finite(largest))  // the code keeps its averages
            return largest_of(D, [&](auto part, int64_t i) __attribute__((always_inline)) {
                return part.get(average + i);
            });
        head.size[k] = size;
        over(D, [&](auto part, int64_t i) __attribute__((always_inline)) { part.put(average + i, next(part, i)); });
        return largest;
    }

    static void move_averages(const EmaHead& head, int64_t begin, int64_t end, float* largest) {
        for (int64_t k = begin; k < end; k++) {
            const float step = head.weight ? (1 - head.decay) * head.weight[k] : 1 - head.decay;
            largest[k] = step < 0.5f ? move_average<true>(head, k, step) : move_average<false>(head, k, step);
        }
    }

    VQOPS_INLINE void to_unit(float* code, int64_t D) {
        typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
        typedef double Wide __attribute__((vector_size(32)));
        const int64_t whole = D / 4 * 4;
        Wide squares = {};
        for (int64_t i = 0; i < whole; i += 4) {
            const Wide value = __builtin_convertvector(*reinterpret_cast<const Four*>(code + i), Wide);
            squares += value * value;
        }
        for (int64_t i = whole; i < D; i++) squares[i - whole] += double(code[i]) * code[i];
        const double norm = divisor((squares[0] + squares[2]) + (squares[1] + squares[3]));
        for (int64_t i = 0; i < whole; i += 4) {
            Four& value = *reinterpret_cast<Four*>(code + i);
            value = __builtin_convertvector(__builtin_convertvector(value, Wide) / norm, Four);
        }
        for (int64_t i = whole; i < D; i++) code[i] = float(code[i] / norm);
    }

    // All quotients of a code are finite if the largest is, and so is their unit.
    static void move_codes(const EmaHead& head, float total, int64_t begin, int64_t end, const float* largest) {
        const int64_t D = head.D;
        for (int64_t k = begin; k < end; k++) {
            const float size = smoothed_size(head.size[k], total, float(head.K), head.eps);
            if (!finite(largest[k] / size)) continue;  // the code stays
            const float* average = head.average + k * D;
            float* code = head.codes + k * D;
            over(D, [&](auto part, int64_t i) __attribute__((always_inline)) {
                part.put(code + i, part.get(average + i) / size);
            });
            if (head.cosine) to_unit(code, D);
        }
    }
};
