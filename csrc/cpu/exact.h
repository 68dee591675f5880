// The distances of csrc/distance.h in vectors, equal to the last bit.
//
// Eight partial sums over i = j mod 8, ascending, multiply and add rounded separately, then a fixed tree. Built with
// -ffp-contract=off, since a fused multiply-add would round differently. Vectors are padded with zeros to a multiple of
// eight, which adds exact zeros. The eight lanes are one vector, so any width of the hardware gives the same bits.
//
// Included once for each instruction set, inside its namespace: the compiler splits vectors to the width of the target
// that a function is defined for, so a shared definition would be as slow as the narrowest.

typedef double Lanes __attribute__((vector_size(64)));
typedef float FloatLanes __attribute__((vector_size(32), aligned(4), may_alias));

VQOPS_INLINE double add_lanes(const Lanes& p) {
    return ((p[0] + p[4]) + (p[2] + p[6])) + ((p[1] + p[5]) + (p[3] + p[7]));
}

// sum_i (x_i - c_i)^2; x and c hold `padded` values, aligned to 64 bytes.
VQOPS_INLINE double squared_distance(const double* x, const double* c, int64_t padded) {
    Lanes sum = {};
    for (int64_t i = 0; i < padded; i += 8) {
        const Lanes e = *reinterpret_cast<const Lanes*>(x + i) - *reinterpret_cast<const Lanes*>(c + i);
        sum += e * e;
    }
    return add_lanes(sum);
}

// The same from D values as float, at any address: what is short of eight at the end is padded here.
VQOPS_INLINE double squared_distance_of_floats(const float* x, const float* c, int64_t D) {
    Lanes sum = {};
    int64_t i = 0;
    for (; i + 8 <= D; i += 8) {
        const Lanes e = __builtin_convertvector(*reinterpret_cast<const FloatLanes*>(x + i), Lanes) -
                        __builtin_convertvector(*reinterpret_cast<const FloatLanes*>(c + i), Lanes);
        sum += e * e;
    }
    Lanes e = {};
    for (int64_t j = i; j < D; j++) e[j - i] = double(x[j]) - double(c[j]);
    sum += e * e;
    return add_lanes(sum);
}

// The same, and the code leaves the row: rest -= code, total += code.
VQOPS_INLINE double take_off_code(float* rest, float* total, const float* code, int64_t D) {
    Lanes sum = {};
    int64_t i = 0;
    for (; i + 8 <= D; i += 8) {
        const FloatLanes r = *reinterpret_cast<const FloatLanes*>(rest + i);
        const FloatLanes c = *reinterpret_cast<const FloatLanes*>(code + i);
        const Lanes e = __builtin_convertvector(r, Lanes) - __builtin_convertvector(c, Lanes);
        sum += e * e;
        *reinterpret_cast<FloatLanes*>(rest + i) = r - c;
        *reinterpret_cast<FloatLanes*>(total + i) += c;
    }
    Lanes e = {};
    for (int64_t j = i; j < D; j++) {
        e[j - i] = double(rest[j]) - double(code[j]);
        rest[j] -= code[j];
        total[j] += code[j];
    }
    sum += e * e;
    return add_lanes(sum);
}

VQOPS_INLINE double dot(const double* x, const double* c, int64_t padded) {
    Lanes sum = {};
    for (int64_t i = 0; i < padded; i += 8) {
        sum += *reinterpret_cast<const Lanes*>(x + i) * *reinterpret_cast<const Lanes*>(c + i);
    }
    return add_lanes(sum);
}

// The cost that is minimised: |x - c|^2, or -x.c / |c| with 0 for a zero code and +inf for an overflowed quotient.
VQOPS_INLINE double cost_of(const double* x, const double* c, int64_t padded, bool cosine) {
    if (!cosine) return squared_distance(x, c, padded);
    const double norm = __builtin_sqrt(dot(c, c, padded));
    if (!(norm > 0)) return 0;
    const double score = -dot(x, c, padded) / norm;
    return score == score ? score : __builtin_inf();
}
