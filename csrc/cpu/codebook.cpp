// Preparation of a codebook for the screening pass. Two passes over the codes: norms and keys, then packing.

#include "codebook.h"
#include "row_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace vqops {
namespace {

constexpr double kUnit = 0x1p-24;    // rounding of float32
constexpr double kDouble = 0x1p-53;  // rounding of float64
constexpr int64_t kSample = 64;      // codes that the centre and the scale are taken from

// The codebook of one head in float64, as the distances that screening approximates see it: c, or c / |c| for cosine.
struct Codes {
    const Rows& rows;
    int64_t h, K, D;
    bool cosine;

    void read(int64_t k, double* out) const { read_row(rows, h, k, D, out); }

    // Divides a row by its norm; a zero row stays zero, and scores zero as the metric wants.
    void direct(double* row) const {
        if (!cosine) return;
        const double square = instructions().dot(row, row, round_up(D, 8));
        if (!(square > 0)) std::fill(row, row + D, 0.0);
        else if (std::isinf(square)) std::fill(row, row + D, std::nan(""));  // float64 overflow: left to float64
        else
            for (int64_t i = 0; i < D; i++) row[i] /= std::sqrt(square);
    }
};

double median(std::vector<double>& values) {
    const auto middle = values.begin() + int64_t(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

// Any centre is correct. The median of a fixed sample removes a common offset and is not moved by single huge codes.
// Returns the power of two that brings the sample's median distance from the centre to about 1.
float choose_centre(const Codes& codes, float* centre) {
    const int64_t step = std::max<int64_t>(1, codes.K / kSample);
    std::vector<double> sample, column;
    const AlignedRow row(codes.D);
    for (int64_t k = 0; k < codes.K && int64_t(sample.size()) < kSample * codes.D; k += step) {
        codes.read(k, row.data);
        codes.direct(row.data);
        if (row.finite()) sample.insert(sample.end(), row.data, row.data + codes.D);
    }
    const int64_t count = int64_t(sample.size()) / codes.D;
    for (int64_t i = 0; i < codes.D; i++) {
        column.clear();
        for (int64_t k = 0; k < count; k++) column.push_back(sample[k * codes.D + i]);
        const float value = count ? float(median(column)) : 0;
        centre[i] = std::isfinite(value) ? value : 0;
    }
    if (codes.cosine || count == 0) return 1;
    std::vector<double> norms;
    for (int64_t k = 0; k < count; k++) {
        double square = 0;
        for (int64_t i = 0; i < codes.D; i++) {
            const double difference = sample[k * codes.D + i] - centre[i];
            square += difference * difference;
        }
        if (square > 0 && std::isfinite(square)) norms.push_back(std::sqrt(square));
    }
    if (norms.empty()) return 1;
    return std::ldexp(1.0f, std::clamp(-std::ilogb(median(norms)), -126, 126));
}

struct Facts {
    double key;     // equal for equal codes
    double radius;  // |c - centre|, scaled; NaN for a code that is not finite
};

// Marks codes that repeat a code of lower index; they can never be chosen, and many of them would fill every list of
// candidates. Open addressing on the keys; ascending order makes the lowest index the one that stays.
std::vector<bool> repeated(const Codes& codes, const std::vector<Facts>& facts) {
    int64_t size = 16;
    while (size < 2 * codes.K) size *= 2;
    std::vector<int32_t> table(size, -1);
    std::vector<bool> marks(codes.K, false);
    std::vector<double> one(codes.D), other(codes.D);
    for (int64_t k = 0; k < codes.K; k++) {
        if (std::isnan(facts[k].radius)) continue;
        uint64_t bits;
        std::memcpy(&bits, &facts[k].key, 8);
        for (uint64_t slot = (bits * 0x9e3779b97f4a7c15u) >> 20;; slot++) {
            int32_t& held = table[slot & uint64_t(size - 1)];
            if (held < 0) {
                held = int32_t(k);
                break;
            }
            if (facts[held].key != facts[k].key) continue;
            codes.read(k, one.data());
            codes.read(held, other.data());
            if (one == other) {
                marks[k] = true;
                break;
            }
        }
    }
    return marks;
}

// A centred and scaled code into its place in a panel, and behind it what the bound needs.
void place_floats(const AlignedRow& code, int64_t D, double radius, float* place) {
    for (int64_t i = 0; i < D; i++) place[i * kPanel] = float(code.data[i]);
    place[D * kPanel] = float(radius * (1 + 0x1p-20));
}

void place_pairs(const AlignedRow& code, int64_t D, double radius, uint16_t* place) {
    double lost = 0;
    for (int64_t i = 0; i < D; i++) {
        uint16_t half = to_bfloat16(float(code.data[i]));
        if ((half & 0x7f80) == 0) half = 0;  // vdpbf16ps would take a denormal for 0
        const double rest = code.data[i] - double(from_bfloat16(half));
        lost += rest * rest;
        place[i / 2 * 2 * kPanel + i % 2] = half;
    }
    uint16_t* const bound = place + (D + 1) / 2 * 2 * kPanel;
    bound[0] = up_to_bfloat16(float(radius * (1 + 0x1p-20)));
    bound[1] = up_to_bfloat16(float(std::sqrt(lost) * (1 + 0x1p-20) + radius * 0x1p-50));
}

}  // namespace

void pack_codebook(const Rows& rows, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                   const Parallel& parallel) {
    const Codes codes{rows, h, K, D, cosine};
    const Packed packed(memory, K, D);
    const float scale = choose_centre(codes, packed.centre);
    for (int64_t i = D; i < round_up(D, 16); i++) packed.centre[i] = 0;

    // Weights that make the sum of a code a key that permutations don't share, and small enough never to overflow.
    const AlignedRow weights(D), centre(D);
    for (int64_t i = 0; i < D; i++) {
        weights.data[i] = 0x1p-20 * (1 + std::fmod(double(i + 1) * 0.6180339887498949, 1.0));
        centre.data[i] = packed.centre[i];
    }
    std::vector<Facts> facts(K);
    parallel.over(K, [&](int64_t begin, int64_t end) {
        const DefaultFloatMode mode;
        const AlignedRow row(D);
        const auto measure = [&] {
            return instructions().measure(row.data, weights.data, centre.data, scale, row.padded);
        };
        for (int64_t k = begin; k < end; k++) {
            codes.read(k, row.data);
            CodeFacts measured = measure();
            facts[k] = {measured.key + 0.0, std::nan("")};  // -0 and 0 are equal
            if (!std::isfinite(measured.key)) continue;
            if (cosine) {
                codes.direct(row.data);
                measured = measure();
            }
            const double radius = std::sqrt(measured.square);
            facts[k].radius = std::isnan(radius) ? INFINITY : radius;  // NaN: a cosine code's norm overflowed
        }
    });

    const std::vector<bool> repeat = repeated(codes, facts);
    std::vector<int32_t> far, repeats;
    int64_t screened = 0, first = -1;
    for (int64_t k = 0; k < K; k++) {
        if (std::isnan(facts[k].radius)) continue;
        if (first < 0) first = k;
        if (repeat[k]) repeats.push_back(int32_t(k));
        else if (facts[k].radius <= kFar) packed.code[screened++] = int32_t(k);
        else far.push_back(int32_t(k));
    }
    int32_t* rest = std::copy(far.begin(), far.end(), packed.code + screened);
    rest = std::copy(repeats.begin(), repeats.end(), rest);
    std::fill(rest, packed.code + round_up(K, 32), 0);

    // exactness.md: the coefficient of |c|^2 / 2 in the bound, and the error of the decision.
    const double gamma = 1.01 * double(D + 6) * kUnit;
    const double decided = 1.01 * double(D / 8 + 8) * kDouble;
    *packed.header = {layout(), cosine, K, D, screened, int64_t(far.size()), int64_t(repeats.size()),
                      scale, float(cosine ? 4 * double(D + 16) * kDouble : 1.01 * decided), first};

    const int64_t covered = packed.panel_count() * kPanel, codes_held = round_up(K, 32);
    std::fill(packed.start + covered, packed.start + codes_held, INFINITY);
    std::fill(packed.slack + covered, packed.slack + codes_held, 0);
    const size_t panel_bytes = size_t(packed.depth) * kPanel * 4;
    char* const panels = static_cast<char*>(packed.panels);
    std::memset(panels + size_t(packed.panel_count()) * panel_bytes, 0, size_t(codes_held - covered) / kPanel * panel_bytes);
    parallel.over(packed.panel_count(), [&](int64_t begin, int64_t end) {
        const DefaultFloatMode mode;
        const AlignedRow row(D);
        for (int64_t p = begin; p < end; p++) {
            void* panel = panels + size_t(p) * panel_bytes;
            std::memset(panel, 0, panel_bytes);
            for (int64_t j = 0; j < kPanel; j++) {
                const int64_t k = p * kPanel + j;
                if (k >= screened) {
                    packed.start[k] = INFINITY;
                    packed.slack[k] = 0;
                    continue;
                }
                const double radius = facts[packed.code[k]].radius;
                const double half = cosine ? 0 : radius * radius / 2;
                const double bound = gamma + 2.02 * decided;
                packed.start[k] = float(half * (1 - bound - 0x1p-23));
                packed.slack[k] = float(half * (2 * bound + 0x1p-21));
                codes.read(packed.code[k], row.data);
                codes.direct(row.data);
                for (int64_t i = 0; i < D; i++) row.data[i] = (row.data[i] - packed.centre[i]) * scale;
                if (instructions().pairs) place_pairs(row, D, radius, static_cast<uint16_t*>(panel) + 2 * j);
                else place_floats(row, D, radius, static_cast<float*>(panel) + j);
            }
        }
    });
}

}  // namespace vqops
