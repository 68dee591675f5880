// Preparation of a codebook for the screening pass. Two passes over the codes: norms and keys, then packing.

#include "codebook.h"
#include "row_buffer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace vqops {
namespace {

constexpr double kDouble = 0x1p-53;  // rounding of float64
// Of the bound, causes in docs/exactness.md.
constexpr double kTwice = 2.02;            // the decision's error in |c|^2, two halves
constexpr double kStart = 0x1p-23;         // rounding of start
constexpr double kHalf = 0x1p-22;          // rounding of the radius that |c|^2 / 2 is computed from
constexpr double kSlack = 0x1p-20;         // both of these, and rounding of slack
constexpr double kUnderflow = 0x1p-120;    // per dimension
constexpr int64_t kSample = 64;      // codes that the centre and the scale are taken from

// The codebook of one head in float64, as the distances that screening approximates see it: c, or c / |c| for cosine.
struct Codes {
    const Rows& rows;
    int64_t h, K, D;
    bool cosine;

    void read(int64_t k, double* out) const { read_row(rows, h, k, D, out); }

    // Divides a row by its norm; a zero row stays zero, and scores zero as the metric wants.
    void normalise(double* row) const {
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
        codes.normalise(row.data);
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

// Until the panels are packed, their memory and that of `start` and `slack` hold what is known of the codes, by index:
// so preparation needs no memory beside the packed codebook.
struct Facts {
    explicit Facts(const Packed& packed)
        : radius(packed.start), key(reinterpret_cast<uint32_t*>(packed.slack)),
          table(reinterpret_cast<int32_t*>(packed.panels)) {}

    float* radius;   // |c - centre|, scaled; NaN for a code that is not finite, kRepeat for one that repeats another
    uint32_t* key;   // equal for equal codes
    int32_t* table;  // of a hash, two entries per code
};
constexpr float kRepeat = -1;

// Fills `facts.radius` and `facts.key`.
void measure_codes(const Codes& codes, const float* centre, float scale, const Facts& facts, const Parallel& parallel) {
    // Weights that make the sum of a code a key that permutations don't share, and small enough never to overflow.
    const int64_t D = codes.D;
    const AlignedRow weights(D), middle(D);
    for (int64_t i = 0; i < D; i++) {
        weights.data[i] = 0x1p-20 * (1 + std::fmod(double(i + 1) * 0.6180339887498949, 1.0));
        middle.data[i] = centre[i];
    }
    parallel.over(codes.K, [&](int64_t begin, int64_t end) {
        const DefaultFloatMode mode;
        const AlignedRow row(D);
        const auto measure = [&] {
            return instructions().measure(row.data, weights.data, middle.data, scale, row.padded);
        };
        for (int64_t k = begin; k < end; k++) {
            codes.read(k, row.data);
            CodeFacts measured = measure();
            const double key = measured.key + 0.0;  // -0 and 0 are equal
            uint64_t bits;
            std::memcpy(&bits, &key, 8);
            facts.key[k] = uint32_t((bits * 0x9e3779b97f4a7c15u) >> 32);
            facts.radius[k] = NAN;
            if (!std::isfinite(key)) continue;
            if (codes.cosine) {
                codes.normalise(row.data);
                measured = measure();
            }
            const float radius = float(std::sqrt(measured.square));
            facts.radius[k] = std::isnan(radius) ? INFINITY : radius;  // NaN: a cosine code's norm overflowed
        }
    });
}

// Marks codes that repeat a code of lower index; they can never be chosen, and many of them would fill every list of
// candidates. Chains of codes by key; ascending order makes the lowest index the one that stays.
void mark_repeats(const Codes& codes, const Facts& facts) {
    int64_t size = 1;
    while (2 * size <= codes.K) size *= 2;
    int32_t *const heads = facts.table, *const next = facts.table + size;
    std::fill(heads, heads + size, -1);
    std::vector<double> one(codes.D), other(codes.D);
    for (int64_t k = 0; k < codes.K; k++) {
        if (std::isnan(facts.radius[k])) continue;
        int32_t& head = heads[facts.key[k] & uint32_t(size - 1)];
        int32_t held = head;
        for (; held >= 0; held = next[held]) {
            if (facts.key[held] != facts.key[k]) continue;
            codes.read(k, one.data());
            codes.read(held, other.data());
            if (one == other) break;
        }
        if (held >= 0) facts.radius[k] = kRepeat;
        else next[k] = head, head = int32_t(k);
    }
}

// One thread's packing of panels.
class PanelWriter {
public:
    PanelWriter(const Codes& codes, const Packed& packed, const Instructions& set)
        : codes_(codes), packed_(packed), set_(set), bytes_(set_.codes * set_.code_bytes(codes.D)),
          work_(new uint32_t[bytes_ / 4]), values_(size_t(set_.codes * codes.D)), zeros_(size_t(codes.D)),
          row_(codes.D) {}

    // Panel p: codes `numbers` of the codebook, of the given radii.
    void write(int64_t p, const int32_t* numbers, const double* radii, int64_t count) {
        const float scale = packed_.header->scale;
        // Of codes near the largest float a difference overflows that is not far.
        const bool overflows = scale * std::numeric_limits<float>::max() <= kFar;
        const bool given = codes_.rows.dtype != DType::float64 && !codes_.cosine && !overflows;
        const float* vectors[kMostCodes];
        for (int64_t j = 0; j < count; j++) {
            float* const buffer = &values_[size_t(j * codes_.D)];
            vectors[j] = given ? float_row(codes_.rows, codes_.h, numbers[j], codes_.D, buffer)
                               : through_double(numbers[j], scale, buffer);
        }
        const float* centre = given ? packed_.centre : zeros_.data();
        set_.place_codes({vectors, count, codes_.D, centre, given ? scale : 1}, radii, packed_.start + p * set_.codes,
                         work_.get(), packed_.panels + p * bytes_);
    }

private:
    const float* through_double(int64_t k, float scale, float* out) {
        codes_.read(k, row_.data);
        codes_.normalise(row_.data);
        for (int64_t i = 0; i < codes_.D; i++) out[i] = float((row_.data[i] - packed_.centre[i]) * scale);
        return out;
    }

    const Codes& codes_;
    const Packed& packed_;
    const Instructions& set_;
    const int64_t bytes_;  // of a panel
    std::unique_ptr<uint32_t[]> work_;
    std::vector<float> values_, zeros_;
    AlignedRow row_;
};

// The error of the decision, relative to |X|^2 + |C|^2.
double decision_of(int64_t D) { return 1.01 * double(D / 8 + 8) * kDouble; }

Header header_of(const Codes& codes, float scale, const Instructions& set) {
    const double decision = codes.cosine ? 4 * double(codes.D + 16) * kDouble : 1.01 * decision_of(codes.D);
    return {layout(set), codes.cosine, codes.K, codes.D, 0, 0, 0, scale, float(decision), -1};
}

// Starts, slacks and panels of the codes in their places, whose radii are in `slack`; NaN: there is none.
void write_panels(const Codes& codes, const Packed& packed, int64_t capacity, const Instructions& set,
                  const Parallel& parallel) {
    const double gamma = 1.01 * double(set.start_roundings(codes.D)) * kUnit, decided = decision_of(codes.D);
    const int64_t screened = packed.header->screened, panels = packed.panel_count(set);
    const int64_t width = set.codes, codes_held = round_up(capacity, kMostCodes);
    std::fill(packed.start + screened, packed.start + codes_held, INFINITY);
    std::fill(packed.slack + screened, packed.slack + codes_held, 0);
    parallel.over(panels, [&](int64_t begin, int64_t end) {
        const DefaultFloatMode mode;
        PanelWriter writer(codes, packed, set);
        double radii[kMostCodes];
        for (int64_t p = begin; p < end; p++) {
            const int64_t count = std::min(width, screened - p * width);
            for (int64_t j = 0, k = p * width; j < count; j++, k++) {
                const bool absent = std::isnan(packed.slack[k]);
                radii[j] = absent ? 0 : packed.slack[k];
                const double half = codes.cosine ? 0 : radii[j] * radii[j] / 2;
                const double bound = gamma + kTwice * decided;
                packed.start[k] = absent ? INFINITY : float(half * (1 - bound - kStart - kHalf));
                packed.slack[k] = float(half * (2 * bound + kSlack));
            }
            writer.write(p, packed.code + p * width, radii, count);
        }
    });
    const int64_t bytes = set.code_bytes(codes.D);
    std::fill(packed.panels + panels * width * bytes, packed.panels + codes_held * bytes, 0);
}

}  // namespace

float rest_of(double norm, const Header& header) {
    const double decision = header.decision * (header.cosine ? norm : norm * norm);
    return float(2 * (decision + kUnderflow * double(header.D) * (1 + norm)));
}

void pack_codebook(const Rows& rows, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                   const Parallel& parallel, const Instructions& set) {
    const Codes codes{rows, h, K, D, cosine};
    const Packed packed(memory, K, D);
    const float scale = choose_centre(codes, packed.centre);
    for (int64_t i = D; i < round_up(D, 16); i++) packed.centre[i] = 0;

    const Facts facts(packed);
    measure_codes(codes, packed.centre, scale, facts, parallel);
    mark_repeats(codes, facts);
    int64_t listed = 0, first = -1;
    const auto list = [&](const auto& belongs) {
        const int64_t before = listed;
        for (int64_t k = 0; k < K; k++)
            if (belongs(facts.radius[k])) packed.code[listed++] = int32_t(k);
        return listed - before;
    };
    const int64_t screened = list([](float radius) { return radius >= 0 && radius <= kFar; });
    const int64_t far = list([](float radius) { return radius > kFar; });
    const int64_t repeats = list([](float radius) { return radius == kRepeat; });
    std::fill(packed.code + listed, packed.code + round_up(K, 32), 0);
    for (int64_t k = K; k-- > 0;)
        if (!std::isnan(facts.radius[k])) first = k;
    if (set.by_radius(D))
        std::sort(packed.code, packed.code + screened,
                  [&](int32_t a, int32_t b) { return facts.radius[a] < facts.radius[b]; });
    for (int64_t k = 0; k < screened; k++) packed.slack[k] = facts.radius[packed.code[k]];  // by place from here on

    *packed.header = header_of(codes, scale, set);
    packed.header->screened = screened, packed.header->far = far, packed.header->repeats = repeats;
    packed.header->first = first;
    write_panels(codes, packed, K, set, parallel);
}

void pack_fours(const Rows& rows, int64_t h, int64_t K, int64_t D, bool cosine, void* memory,
                std::vector<int32_t>& far, const Parallel& parallel) {
    const Codes codes{rows, h, K, D, cosine};
    const Instructions& set = drawing_instructions();
    const int64_t places = places_of(K), lanes = set.lanes;
    const Packed packed(memory, places, D);
    const float scale = choose_centre(codes, packed.centre);
    std::fill(packed.centre + D, packed.centre + round_up(D, 16), 0.0f);
    const Facts facts(packed);
    measure_codes(codes, packed.centre, scale, facts, parallel);
    const std::vector<float> radius(facts.radius, facts.radius + K);
    for (int64_t place = 0; place < places; place++) {
        const int64_t i = place % lanes, j = place / lanes % 4;
        const int64_t k = place / (4 * lanes) * (4 * lanes) + 4 * i + j;
        packed.code[place] = k < K ? int32_t(k) : 0;
        packed.slack[place] = k < K && radius[k] <= kFar ? radius[k] : NAN;
        if (k < K && radius[k] > kFar) far.push_back(int32_t(k));
    }
    *packed.header = header_of(codes, scale, set);
    packed.header->screened = places;
    write_panels(codes, packed, places, set, parallel);
}

}  // namespace vqops

extern "C" int64_t vqops_cpu_packed_bytes(int64_t K, int64_t D) { return vqops::Packed::bytes(K, D); }
