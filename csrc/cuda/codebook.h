// A codebook prepared for the screening pass: centre, scale, and its codes as float16 with what their bounds need.
//
//   Survey       the centre and the scale, from a sample of the codes (prepare.h)
//   MarkCodes    8 threads per code: the lowest index of each of two hashes, by which repeats are found; the power of
//                two that all codes of a tile are stored in units of
//   Pack         32 threads per code: the code centred, scaled, rounded; read two to four times, from cache
// Everything is computed in float64: the codebook is small next to the search. Any centre is correct, and so is
// any hash: a repeat that is missed is one more candidate.
#pragma once

#include "../distance.h"
#include "block.h"
#include "bound.h"
#include "memory.h"

namespace vqops::cuda {

constexpr int kTile = 64;  // codes of a tile as it is stored
constexpr int kWholeTiles = 128;  // the packed codebook is a multiple of it: two tiles for a product of a warpgroup
constexpr int kSample = 32;
constexpr int64_t kMostCodes = 1 << 30;
constexpr int32_t kUnmarked = INT32_MAX;
constexpr double kMostHalf = 0x1.ffp15;   // float16 has a little more
constexpr double kMostDivisor = 0x1p511;  // of a code; c.c of the decision may overflow where that of Pack does not

// Dimensions as stored: whole steps of the loop over them, of 64, 32 or 16.
VQOPS_HOST_DEVICE int64_t padded(int64_t D) { return D > 32 ? round_up(D, 64) : D > 16 ? 32 : 16; }

// Dimensions of a piece: what a row of shared memory holds, 32, 64 or 128 bytes.
VQOPS_HOST_DEVICE int piece_of(int64_t width) { return width < 64 ? int(width) : 64; }

// Place in shared memory of dimension i of a row, in a piece of `piece` dimensions: 16-byte words of neighbouring rows
// change places, so that eight rows of a fragment lie in different banks. The 32, 64 and 128-byte swizzles of the
// PTX manual, which wgmma reads.
VQOPS_HOST_DEVICE int swizzled(int row, int i, int piece) {
    const int element = row * piece + i;
    return element ^ ((element >> 6 & (piece / 8 - 1)) << 3);
}

// A value of each of a tile's codes, read in twos.
struct OfCodes {
    struct alignas(8) Two {
        float v[2];
    } two[kTile / 2];

    VQOPS_HOST_DEVICE float& operator[](int c) { return two[c / 2].v[c % 2]; }
    VQOPS_HOST_DEVICE float operator[](int c) const { return two[c / 2].v[c % 2]; }
};

// Constants of the bounds of a tile's codes, see bound.h.
struct alignas(16) Constants {
    OfCodes start;       // kAbsentStart for codes left out, also repeats of one of a lower index
    OfCodes radius;
    OfCodes start_topk;  // start, where repeats count
    float unit;          // power of two, of all codes as stored
    float largest;       // radius
};

// Codes left out that may yet be the nearest of a row: none; too far from the centre, which rows near it need not care
// for; or of no known distance, so that every row is compared with all codes.
enum Far : int32_t { kNoneFar, kSomeFar, kAnywhere };

// One head. K' is K rounded up to whole tiles, D' the dimensions as stored.
struct Packed {
    float *scale, *worst;  // [1] twice; worst: the largest relative error of a code (row_bound)
    float* closest;        // [1] the smallest radius
    int32_t* first;        // [1] the first finite code, kUnmarked if there is none
    Far* far;              // [1]
    float* centre;         // [D]
    Constants* constants;  // [K' / 64]
    uint16_t* codes;       // [K' / 64, pieces, 64, piece] float16, C / unit, a piece as shared memory will have it

    VQOPS_HOST_DEVICE static Packed take(Memory& memory, int64_t K, int64_t D) {
        const int64_t codes = round_up(K, kWholeTiles);
        Packed p;
        p.scale = memory.take<float>(1), p.worst = memory.take<float>(1), p.closest = memory.take<float>(1);
        p.first = memory.take<int32_t>(1), p.far = memory.take<Far>(1), p.centre = memory.take<float>(D);
        p.constants = memory.take<Constants>(codes / kTile);
        p.codes = memory.take<uint16_t>(codes * padded(D));
        return p;
    }

    // Element i of C.
    VQOPS_HOST_DEVICE double centred(double element, double divisor, int64_t i) const {
        return (element / divisor - centre[i]) * double(*scale);
    }

    // Whether the nearest code of a row is among those that are not left out. norm: |X|.
    VQOPS_HOST_DEVICE bool reaches(float norm) const {
        return *far == kNoneFar || (*far == kSomeFar && float(kTwice) * norm + *closest < float(kReach));
    }

    VQOPS_HOST_DEVICE static int64_t place(int64_t k, int64_t i, int64_t width) {
        const int piece = piece_of(width);
        return k / kTile * kTile * width + i / piece * kTile * piece + swizzled(int(k % kTile), int(i % piece), piece);
    }

    static int64_t bytes(int64_t K, int64_t D) {
        Memory dry;
        take(dry, K, D);
        return dry.size;
    }
};

// A codebook to pack, and where to: the heads one behind the other.
struct Preparation {
    int64_t H, K, D;
    Rows codebook;  // [H, K, D]
    bool cosine;
    char* memory;    // [H, stride]
    int64_t stride;  // Packed::bytes(K, D)
    int32_t* marks;  // [H, 2, slots]
    int64_t slots;   // a power of two, at least 2 K

    VQOPS_HOST_DEVICE Packed head(int64_t h) const {
        Memory here(memory + h * stride);
        return Packed::take(here, K, D);
    }

    VQOPS_HOST_DEVICE int64_t sampled(int i) const { return K > kSample ? K / kSample * i : i; }
    VQOPS_HOST_DEVICE int sample() const { return K < kSample ? int(K) : kSample; }

    // Divisor of a code, by the square of its elements: NaN if it is not finite, inf if it overflows.
    VQOPS_HOST_DEVICE double divisor_of(double square, double zero) const {
        if (zero != 0) return NAN;
        if (!cosine) return 1;
        return square > 0 ? std::sqrt(square) : 1;
    }
};

constexpr int64_t slots_of(int64_t K) {
    int64_t slots = 16;
    while (slots < 2 * K) slots *= 2;
    return slots;
}

// Two hashes of a code, sums over its elements of both signs of zero alike.
struct Hash {
    uint32_t one, two;
};

VQOPS_HOST_DEVICE void add_to_hash(Hash& hash, double value, int64_t i) {
    const double plain = value + 0.0;
    uint64_t bits;
    memcpy(&bits, &plain, 8);
    const uint32_t odd = uint32_t(2 * i + 1), low = uint32_t(bits), high = uint32_t(bits >> 32);
    hash.one += (high ^ (high >> 15) ^ low * 0x27d4eb2f) * (odd * 0x9e3779b1);
    hash.two += (high ^ (high >> 11) ^ low * 0x165667b1) * (odd * 0x85ebca77);
}

VQOPS_HOST_DEVICE Hash mixed(Hash hash) {
    hash.one = (hash.one ^ (hash.one >> 16)) * 0x85ebca6b, hash.two = (hash.two ^ (hash.two >> 16)) * 0xc2b2ae35;
    return {hash.one ^ (hash.one >> 13), hash.two ^ (hash.two >> 13)};
}

// Positive floats are in the order of their bits.
template <class Block>
VQOPS_HOST_DEVICE void atomic_max(Block& block, float* place, float value) {
    block.atomic_max(reinterpret_cast<int32_t*>(place), ordered(value));
}

struct MarkCodes {
    static constexpr int kThreads = 256, kCodes = kThreads / 8;
    struct Shared {};
    Preparation in;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return in.H * ((in.K + kCodes - 1) / kCodes); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        const uint32_t across = uint32_t((in.K + kCodes - 1) / kCodes), h = uint32_t(block.index) / across;
        auto one = block.template registers<uint32_t>(), two = block.template registers<uint32_t>();
        auto sums = block.template registers<Doubles<2>>();
        auto square = block.template registers<double>();
        const Packed packed = in.head(h);
        const int64_t first = uint32_t(block.index) % across * kCodes;
        const auto code_of = [&](int t) { return first + t / 8; };
        block.for_threads([&](int t) {
            Hash hash = {0, 0};
            sums[t].v[0] = sums[t].v[1] = 0;
            const int64_t k = code_of(t);
            for (int64_t i = t % 8; i < in.D && k < in.K; i += 8) {
                const double value = in.codebook.at(in.codebook.offset(h, k), i);
                sums[t].v[0] += value * value, sums[t].v[1] += 0 * value;
                add_to_hash(hash, value, i);
            }
            one[t] = hash.one, two[t] = hash.two;
        });
        block.template shuffle_sum<8>(one);
        block.template shuffle_sum<8>(two);
        block.template shuffle_sum<8>(sums);
        block.for_threads([&](int t) {
            square[t] = 0;
            const double divisor = in.divisor_of(sums[t].v[0], sums[t].v[1]);
            for (int64_t i = t % 8; i < in.D && code_of(t) < in.K; i += 8) {
                const double C = packed.centred(in.codebook.at(in.codebook.offset(h, code_of(t)), i), divisor, i);
                square[t] += C * C;
            }
        });
        block.template shuffle_sum<8>(square);
        block.for_threads([&](int t) {
            if (t % 8 != 0 || code_of(t) >= in.K) return;
            const double norm = std::sqrt(square[t]);
            if (norm <= kFarCode)
                atomic_max(block, &packed.constants[code_of(t) / kTile].unit, float(power_of_two(unit_exponent(norm))));
            const Hash hash = mixed({one[t], two[t]});
            int32_t* const marks = in.marks + 2 * h * in.slots;
            block.atomic_min(&marks[hash.one & (in.slots - 1)], int32_t(code_of(t)));
            block.atomic_min(&marks[in.slots + (hash.two & (in.slots - 1))], int32_t(code_of(t)));
        });
    }
};

struct Pack {
    static constexpr int kThreads = 128, kCodes = kThreads / 32;
    struct Shared {};
    Preparation in;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return in.H * (round_up(in.K, kWholeTiles) / kCodes); }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        const uint32_t across = uint32_t(round_up(in.K, kWholeTiles) / kCodes), h = uint32_t(block.index) / across;
        const int64_t first = uint32_t(block.index) % across * kCodes, width = padded(in.D);
        const Packed packed = in.head(h);
        auto one = block.template registers<uint32_t>(), two = block.template registers<uint32_t>();
        auto sums = block.template registers<Doubles<2>>();
        auto found = block.template registers<Doubles<3>>();
        auto divisors = block.template registers<double>(), lost = block.template registers<double>();
        const auto code_of = [&](int t) { return first + t / 32; };
        const auto element = [&](int64_t k, int64_t i) { return in.codebook.at(in.codebook.offset(h, k), i); };
        const auto centred = [&](int t, int64_t i) {
            return packed.centred(element(code_of(t), i), divisors[t], i);
        };

        block.for_threads([&](int t) {
            Hash hash = {0, 0};
            sums[t].v[0] = sums[t].v[1] = 0;
            for (int64_t i = t % 32; i < in.D && code_of(t) < in.K; i += 32) {
                const double value = element(code_of(t), i);
                sums[t].v[0] += value * value, sums[t].v[1] += 0 * value;
                add_to_hash(hash, value, i);
            }
            one[t] = hash.one, two[t] = hash.two;
        });
        block.template shuffle_sum<32>(one);
        block.template shuffle_sum<32>(two);
        block.template shuffle_sum<32>(sums);

        // found: elements that differ from each marked code, and |C|^2.
        block.for_threads([&](int t) {
            const int64_t k = code_of(t);
            divisors[t] = in.divisor_of(sums[t].v[0], sums[t].v[1]);
            found[t].v[0] = found[t].v[1] = found[t].v[2] = 0;
            if (k >= in.K) return;
            const Hash hash = mixed({one[t], two[t]});
            const int32_t* const marks = in.marks + 2 * h * in.slots;
            const int64_t a = marks[hash.one & (in.slots - 1)], b = marks[in.slots + (hash.two & (in.slots - 1))];
            for (int64_t i = t % 32; i < in.D; i += 32) {
                const double value = element(k, i), C = centred(t, i);
                found[t].v[0] += a >= k || element(a, i) != value ? 1 : 0;
                found[t].v[1] += b >= k || element(b, i) != value ? 1 : 0;
                found[t].v[2] += C * C;
            }
        });
        block.template shuffle_sum<32>(found);

        const auto unit_of = [&](int t) { return double(packed.constants[code_of(t) / kTile].unit); };
        const auto is_near = [&](int t) {
            const double norm = std::sqrt(found[t].v[2]);
            return code_of(t) < in.K && divisors[t] < kMostDivisor && norm <= kFarCode &&
                   norm <= kMostHalf * unit_of(t);
        };
        block.for_threads([&](int t) {
            const bool near = is_near(t);
            const double lift = near ? 1 / unit_of(t) : 0;
            lost[t] = 0;
            for (int64_t i = t % 32; i < width; i += 32) {
                const double scaled = near && i < in.D ? centred(t, i) * lift : 0.0;
                const Float16 half = rounded<Float16>(scaled);
                const double e = scaled - real(half);
                lost[t] += e * e;
                packed.codes[Packed::place(code_of(t), i, width)] = half.bits;
            }
        });
        block.template shuffle_sum<32>(lost);

        block.for_threads([&](int t) {
            if (t % 32 != 0) return;
            const int64_t k = code_of(t);
            const bool finite = k < in.K && divisors[t] == divisors[t];
            const bool repeat = k < in.K && (found[t].v[0] == 0 || found[t].v[1] == 0);
            float start = kAbsentStart, radius = 0;
            Constants& tile = packed.constants[k / kTile];
            if (finite) block.atomic_min(packed.first, int32_t(k));
            if (is_near(t)) {
                const double norm = std::sqrt(found[t].v[2]), half = in.cosine ? 0 : found[t].v[2] / 2;
                const double error = std::sqrt(lost[t]) * unit_of(t) * (1 + 0x1p-40) + norm * 0x1p-45 + 0x1p-100 +
                                     (in.cosine ? double(in.D + 16) * 0x1p-51 : 0);
                double around = norm + error > kSmallestRadius ? norm + error : kSmallestRadius;
                if (around * kMostError < error) around = error / kMostError;
                start = code_start(half, in.D), radius = float(around * (1 + 0x1p-20));
                atomic_max(block, packed.worst,
                           float((error + accumulation(width) * (norm + error)) / radius * (1 + 0x1p-20)));
                atomic_max(block, &tile.largest, radius);
                block.atomic_min(reinterpret_cast<int32_t*>(packed.closest), ordered(radius));
            } else if (finite) {
                block.atomic_max(reinterpret_cast<int32_t*>(packed.far), in.cosine ? kAnywhere : kSomeFar);
            }
            tile.radius[k % kTile] = radius, tile.start_topk[k % kTile] = start;
            tile.start[k % kTile] = repeat ? kAbsentStart : start;
        });
    }
};

}  // namespace vqops::cuda
