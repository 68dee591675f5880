// The bodies of the CUDA kernels on the CPU, block by block and thread by thread (emulated_block.h), for ctypes.
// Built and called by tests/test_cuda_kernels.py.

#include <algorithm>
#include <memory>
#include <numeric>

#include "../../csrc/cuda/code_sums.h"
#include "../../csrc/cuda/ema.h"
#include "../../csrc/cuda/finalize.h"
#include "../../csrc/cuda/gradient.h"
#include "../../csrc/cuda/search.h"
#include "emulated_block.h"

using namespace vqops;
using namespace vqops::cuda;

namespace {

struct Emulator {
    bool descending;  // blocks and threads
    int adder = 16;
    int64_t* additions = nullptr;

    template <class Kernel>
    void launch(const Kernel& kernel) const {
        // Shared memory starts with what the last block left; here with what shows.
        const size_t bytes = std::max<size_t>(kernel.shared_bytes(), sizeof(typename Kernel::Shared));
        struct alignas(1024) Unit {
            double poison[128];
        };
        std::vector<Unit> memory((bytes + 1023) / 1024);
        auto* const shared = reinterpret_cast<unsigned char*>(memory.data());
        const int64_t blocks = kernel.blocks();
        for (int64_t i = 0; i < blocks; i++) {
            for (Unit& unit : memory) std::fill_n(unit.poison, 128, NAN);
            const int64_t index = descending ? blocks - 1 - i : i;
            EmulatedBlock block = {index, Kernel::kThreads, descending, adder, shared, additions};
            kernel(block, *reinterpret_cast<typename Kernel::Shared*>(shared));
        }
    }

    void fill(void* data, int byte, int64_t bytes) const { memset(data, byte, bytes); }

    void sort(const RowsByCode& s) const {
        std::vector<uint32_t> place(s.rows());
        std::iota(place.begin(), place.end(), 0);
        std::stable_sort(place.begin(), place.end(), [&](uint32_t a, uint32_t b) { return s.key[a] < s.key[b]; });
        for (int64_t i = 0; i < s.rows(); i++) s.keys[i] = s.key[place[i]], s.order[i] = s.row[place[i]];
    }
};

// Sums by code; those in the sorted order with a workspace, poisoned.
template <class T>
struct Space {
    Space(const RowsByCode& by_code, bool sorted, int64_t D, int64_t columns, void* sums, DType dtype, Count* counts,
          float* weights)
        : out{by_code, D, columns, sums, dtype, counts, weights, nullptr} {
        if (!sorted) return;
        Memory dry;
        take(dry);
        data.assign(dry.size / 4, 0x7fc0dead);
        Memory memory(data.data());
        take(memory);
    }
    void take(Memory& memory) {
        out.by_code.take(memory, 0);
        out.partial = memory.take<T>(out.by_code.slots() * out.columns);
    }
    Sums<T> out;
    std::vector<uint32_t> data;
};

template <class Body>
void with_type(DType type, Body body) {
    switch (type) {
        case DType::float32: return body(float());
        case DType::float64: return body(double());
        case DType::float16: return body(Float16());
        case DType::bfloat16: return body(BFloat16());
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// `sorted`: the order of the reference, else that of atomic operations, whose number is returned.
EXPORT int64_t code_sums(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                         const Rows* weight, const Indices* indices, float* sums, Count* counts, float* weights) {
    const int64_t columns = D + (weight->data ? 1 : 0);
    const Space<float> space({H, N, K, *indices}, sorted, D, columns, sums, DType::float32, counts, weights);
    int64_t additions = 0;
    const Emulator device = {descending != 0, 16, &additions};
    with_type(x->dtype, [&](auto zero) { code_sums(device, x->as<decltype(zero)>(), *weight, space.out); });
    return additions;
}

EXPORT void finalize(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                     const Rows* codebook, const Rows* weight, const Indices* indices, const RowMask* mask, int cosine,
                     int with_sums, void* quantized, void* error, float* sums, Count* counts, float* weights) {
    const int64_t columns = D + (weight->data ? 1 : 0);
    const RowsByCode by_code = {H, N, K, *indices};
    const Space<float> space(by_code, sorted, D, columns, sums, DType::float32, counts, weights);
    const Emulator device = {descending != 0};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        using Real = typename ErrorOf<T>::type;
        finalize(device,
                 FinalizeInputs<T>{D, x->as<T>(), *codebook, *weight, *mask, cosine != 0, static_cast<T*>(quantized),
                                   static_cast<Real*>(error), with_sums ? space.out : Sums<float>{by_code}},
                 with_sums);
    });
}

EXPORT void ema_update(int descending, const EmaState* state) {
    Emulator device = {descending != 0};
    ema_update(device, *state);
}

// grad_codebook has the codebook's dtype in the sorted order, else that of the sums: float64 if x or the codebook has.
EXPORT void gradient(int descending, int sorted, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* quantized,
                     const Rows* error, const Rows* x, const Rows* codebook, const Indices* indices,
                     const RowMask* mask, int cosine, int passing, double scale, void* grad_x, void* grad_codebook) {
    Emulator device = {descending != 0};
    const bool wide = x->dtype == DType::float64 || codebook->dtype == DType::float64;
    const auto run = [&](auto typed, auto reals) {
        using T = decltype(typed);
        using Real = decltype(reals);
        const GradientInputs<T, Real> in = {H, N, D, x->as<T>(), quantized->as<T>(), *error, *codebook, *indices,
                                            *mask, Passing(passing), cosine != 0, scale};
        if (grad_x) gradient_of_rows(device, in, static_cast<T*>(grad_x), static_cast<Real*>(nullptr));
        if (!grad_codebook) return;
        const DType dtype = sorted ? codebook->dtype : wide ? DType::float64 : DType::float32;
        const Space<Real> space({H, N, K, *indices}, sorted, D, D, grad_codebook, dtype, nullptr, nullptr);
        std::vector<Real> inverse(H * N, NAN);
        gradient_of_codes(device, in, space.out, inverse.data());
    };
    with_type(x->dtype, [&](auto typed) {
        if (wide) run(typed, double());
        else run(typed, float());
    });
}

// shared_bytes, wgmma and multiprocessors as in search.h, 0 bytes to compare everything in float64; adder as in
// emulated_block.h
EXPORT void search(int descending, int64_t shared_bytes, int wgmma, int64_t multiprocessors, int adder, int64_t H,
                   int64_t N, int64_t K, int64_t D, const Rows* x, const Rows* codebook, const RowMask* mask,
                   int cosine, int64_t* indices, int64_t k, void* distances, DType dtype, Count* tiers) {
    Emulator device = {descending != 0, adder};
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K);
    std::vector<double> memory(H * bytes / 8, NAN);
    std::vector<int32_t> marks(H * 2 * slots), how_many(H, -1);
    std::vector<uint32_t> left(H * N);
    std::vector<Best> parts(H * parts_of(N, K), Best{-1, 0});
    std::vector<Candidates> lists(H * (2 * multiprocessors + 1) * N);
    const Preparation packed = {H, K, D, *codebook, cosine != 0, reinterpret_cast<char*>(memory.data()), bytes,
                                marks.data(), slots};
    if (shared_bytes) pack_codebook(device, packed);
    const SearchOutputs out = {indices, k, distances, dtype, tiers, left.data(), how_many.data(),
                               parts.data(), lists.data()};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        search(device, SearchInputs<T>{H, N, K, D, x->as<T>(), *codebook, *mask, cosine != 0}, out, packed,
               Abilities{size_t(shared_bytes), wgmma != 0, multiprocessors});
    });
}

EXPORT int64_t packed_bytes(int64_t H, int64_t K, int64_t D) { return H * Packed::bytes(K, D); }

// The rows of a block and their bounds, as Screen has them: float16 of X in units of `unit`.
struct TakeRows {
    typedef RowTile<float, WarpCores<4, 1, 1>, 64> Rows;
    static constexpr int kThreads = Rows::kThreads;
    typedef Rows::Shared Shared;
    Rows rows;
    Packed packed;
    double* stored;  // [N, width]
    float* unit;     // [N]
    RowBound* bound; // [N]

    size_t shared_bytes() const { return sizeof(Shared) + rows.bytes(); }
    int64_t blocks() const { return (rows.in.N + Rows::kRows - 1) / Rows::kRows; }

    template <class Block>
    void operator()(Block& block, Shared& shared) const {
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);
        const int64_t first = block.index * Rows::kRows, width = rows.width();
        rows.take(block, shared, packed, x, 0, first);
        for (int r = 0; r < Rows::kRows && first + r < rows.in.N; r++) {
            for (int64_t i = 0; i < width; i++)
                stored[(first + r) * width + i] = real(Float16{x[Rows::place(r, int(i))]});
            unit[first + r] = shared.unit[r], bound[first + r] = shared.bound[r];
        }
    }
};

// For one head of float32 and D > 32, every pair's bounds as Screen has them, and t in long double: [N, K] each.
EXPORT void bounds(int adder, int64_t N, int64_t K, int64_t D, const Rows* x, const Rows* codebook, int cosine,
                   double* lower, double* upper, double* exact) {
    const Emulator device = {false, adder};
    const EmulatedBlock cores = {0, 32, false, adder, nullptr};
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K), width = padded(D);
    std::vector<double> memory(bytes / 8, NAN), stored(N * width);
    std::vector<int32_t> marks(2 * slots);
    std::vector<float> unit(N);
    std::vector<RowBound> row(N);
    char* const place = reinterpret_cast<char*>(memory.data());
    const Preparation in = {1, K, D, *codebook, cosine != 0, place, bytes, marks.data(), slots};
    pack_codebook(device, in);
    const Packed packed = in.head(0);
    const SearchInputs<float> given = {1, N, K, D, x->as<float>(), *codebook, RowMask{}, cosine != 0};
    device.launch(TakeRows{{given}, packed, stored.data(), unit.data(), row.data()});
    for (int64_t n = 0; n < N; n++) {
        // For cosine, X is x times a power of two, which the largest element tells.
        double scale = *packed.scale, largest = 0;
        for (int64_t i = 0; i < D; i++) largest = std::max(largest, std::fabs(x->at(x->offset(0, n), i)));
        if (cosine) scale = power_of_two(-exponent_of(largest));
        for (int64_t k = 0; k < K; k++) {
            const Constants& tile = packed.constants[k / kTile];
            const int c = int(k % kTile);
            float product = 0;
            std::vector<double> code(width);
            for (int64_t i = 0; i < width; i++) code[i] = real(Float16{packed.codes[Packed::place(k, i, width)]});
            for (int64_t i = 0; i < width; i += adder)
                product = cores.add_truncated(product, &stored[n * width + i], &code[i]);
            const float units = unit[n] * tile.unit[c];
            const float low = lower_bound(product, units, tile.start[c], tile.radius[c], row[n].radius);
            lower[n * K + k] = low;
            upper[n * K + k] = tile.upper(c, low, row[n]);
            long double t = 0, norm = 0;
            const int64_t place = codebook->offset(0, k);
            for (int64_t i = 0; i < D; i++)
                norm += static_cast<long double>(codebook->at(place, i)) * codebook->at(place, i);
            for (int64_t i = 0; i < D; i++) {
                const long double value = codebook->at(place, i), centre = packed.centre[i];
                const long double C = cosine ? value / std::sqrt(norm) - centre : (value - centre) * *packed.scale;
                const long double X = (x->at(x->offset(0, n), i) - (cosine ? 0 : centre)) * scale;
                t += (cosine ? 0 : C * C / 2) - X * C;
            }
            exact[n * K + k] = double(t);
        }
    }
}
