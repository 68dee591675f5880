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
        const std::unique_ptr<double[]> memory(new double[(bytes + 7) / 8]);
        const int64_t blocks = kernel.blocks();
        for (int64_t i = 0; i < blocks; i++) {
            std::fill_n(memory.get(), (bytes + 7) / 8, NAN);
            EmulatedBlock block = {descending ? blocks - 1 - i : i, Kernel::kThreads, descending, adder, additions};
            kernel(block, *reinterpret_cast<typename Kernel::Shared*>(memory.get()));
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

// row_tiles and adder as in search.h and emulated_block.h.
EXPORT void search(int descending, int row_tiles, int adder, int64_t H, int64_t N, int64_t K, int64_t D, const Rows* x,
                   const Rows* codebook, const RowMask* mask, int cosine, int64_t* indices, int64_t k, void* distances,
                   DType dtype, Count* tiers) {
    Emulator device = {descending != 0, adder};
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K);
    std::vector<double> memory(H * bytes / 8, NAN);
    std::vector<int32_t> marks(H * 2 * slots), how_many(H, -1);
    std::vector<uint32_t> left(H * N);
    const Preparation packed = {H, K, D, *codebook, cosine != 0, reinterpret_cast<char*>(memory.data()), bytes,
                                marks.data(), slots};
    if (row_tiles) pack_codebook(device, packed);
    const SearchOutputs out = {indices, k, distances, dtype, tiers, left.data(), how_many.data()};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        search(device, SearchInputs<T>{H, N, K, D, x->as<T>(), *codebook, *mask, cosine != 0}, out, packed, row_tiles);
    });
}

EXPORT int64_t packed_bytes(int64_t H, int64_t K, int64_t D) { return H * Packed::bytes(K, D); }

// For one head of float32, every pair's bounds as Screen has them, and t in long double: [N, K] each.
EXPORT void bounds(int adder, int64_t N, int64_t K, int64_t D, const Rows* x, const Rows* codebook, int cosine,
                   double* lower, double* upper, double* exact) {
    const Emulator device = {false, adder};
    const EmulatedBlock cores = {0, 32, false, adder};
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K), width = padded(D);
    std::vector<double> memory(bytes / 8, NAN);
    std::vector<int32_t> marks(2 * slots);
    char* const place = reinterpret_cast<char*>(memory.data());
    const Preparation in = {1, K, D, *codebook, cosine != 0, place, bytes, marks.data(), slots};
    pack_codebook(device, in);
    const Packed packed = in.head(0);
    const double scale = *packed.scale;
    for (int64_t n = 0; n < N; n++) {
        std::vector<double> X(width), stored(width);
        double square = 0, lost = 0;
        for (int64_t i = 0; i < D; i++) {
            const double given = x->at(x->offset(0, n), i);
            X[i] = cosine ? given : (given - packed.centre[i]) * scale;
            square += X[i] * X[i];
        }
        const double unit = power_of_two(unit_exponent(std::sqrt(square)));
        for (int64_t i = 0; i < D; i++) {
            stored[i] = real(rounded<Float16>(X[i] / unit));
            lost += (X[i] / unit - stored[i]) * (X[i] / unit - stored[i]);
        }
        const RowBound row = row_bound(std::sqrt(square), std::sqrt(lost) * unit, *packed.worst, D, cosine);
        for (int64_t k = 0; k < K; k++) {
            float product = 0;
            std::vector<double> code(width);
            for (int64_t i = 0; i < width; i++) code[i] = real(Float16{packed.codes[k * width + i]});
            for (int64_t i = 0; i < width; i += adder) product = cores.add_truncated(product, &stored[i], &code[i]);
            const float low = lower_bound(product, float(unit) * packed.unit[k], packed.start[k],
                                          packed.radius[k], row.radius);
            lower[n * K + k] = low;
            upper[n * K + k] = upper_bound(low, packed.slack[k], packed.radius[k], row);
            long double t = 0, norm = 0;
            const int64_t c = codebook->offset(0, k);
            for (int64_t i = 0; i < D; i++) norm += static_cast<long double>(codebook->at(c, i)) * codebook->at(c, i);
            for (int64_t i = 0; i < D; i++) {
                const long double value = codebook->at(c, i), centre = packed.centre[i];
                const long double C = cosine ? value / std::sqrt(norm) - centre : (value - centre) * scale;
                t += (cosine ? 0 : C * C / 2) - X[i] * C;
            }
            exact[n * K + k] = double(t);
        }
    }
}
