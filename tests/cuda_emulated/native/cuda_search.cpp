// The bodies of the CUDA search on the CPU, for ctypes: cuda_blocks.py.

#include "../../../csrc/cuda/passes.h"
#include "../../../csrc/cuda/products.h"
#include "emulator.h"

using namespace vqops;
using namespace vqops::cuda;

// Gives the number of kernels and fills. shared_bytes, wgmma and multiprocessors as in search.h (Abilities), 0 bytes to
// compare everything in float64; adder as in emulated_block.h
EXPORT int64_t search(int descending, int64_t shared_bytes, int wgmma, int64_t multiprocessors, int adder, int64_t H,
                      int64_t N, int64_t K, int64_t D, const Rows* x, const Rows* codebook, const RowMask* mask,
                      int cosine, int prepared, int64_t* indices, int64_t k, void* distances, DType dtype,
                      Count* tiers) {
    int64_t calls = 0;
    const Emulator device = {descending != 0, adder, nullptr, &calls};
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K);
    std::vector<double> memory(H * bytes / 8, NAN);
    std::vector<int32_t> marks(H * 2 * slots), counters(counters_of(H, N), -1);
    std::vector<uint32_t> queue(H * N);
    std::vector<Best> parts(H * parts_of(N, K), Best{-1, 0});
    std::vector<Candidates> lists(H * (2 * multiprocessors + 1) * N);
    char* const place = shared_bytes ? reinterpret_cast<char*>(memory.data()) : nullptr;
    const Preparation packed = {H, K, D, *codebook, cosine != 0, place, bytes, marks.data(), slots};
    if (prepared) pack_codebook(Emulator{descending != 0, adder}, packed);
    const SearchOutputs out = {indices, k, distances, dtype, tiers, queue.data(), counters.data(), counters.data() + H,
                               parts.data(), lists.data()};
    with_type(x->dtype, [&](auto zero) {
        using T = decltype(zero);
        search(device, SearchInputs<T>{{H, N, K, D, cosine != 0}, x->as<T>(), *codebook, *mask}, out, packed,
               prepared != 0, Abilities{size_t(shared_bytes), Wgmma(wgmma), multiprocessors});
    });
    return calls;
}

// Centre and scale of a codebook: [H, D] and [H].
EXPORT void survey(int descending, int64_t H, int64_t K, int64_t D, const Rows* codebook, int cosine, float* centre,
                   float* scale) {
    const int64_t bytes = Packed::bytes(K, D), slots = slots_of(K);
    std::vector<double> memory(H * bytes / 8, NAN);
    std::vector<int32_t> marks(H * 2 * slots);
    char* const place = reinterpret_cast<char*>(memory.data());
    const Preparation in = {H, K, D, *codebook, cosine != 0, place, bytes, marks.data(), slots};
    Emulator{descending != 0}.launch(Survey{in, {}});
    for (int64_t h = 0; h < H; h++) {
        std::copy_n(in.head(h).centre, D, centre + h * D);
        scale[h] = *in.head(h).scale;
    }
}

EXPORT int64_t packed_bytes(int64_t H, int64_t K, int64_t D) { return H * Packed::bytes(K, D); }

// The tensor cores of the search by depth: 0 without a fast pass, 1 mma.sync, 2 wgmma, 3 with a loader.
EXPORT int cores_of(int64_t shared_bytes, int wgmma, int64_t D) {
    int found = 0;
    with_nearest_screen(SearchInputs<float>{{1, 1, 1, D, false}, {}, {}, {}}, {}, {},
                        Abilities{size_t(shared_bytes), Wgmma(wgmma), 1}, [&]<class Kernel>(const Kernel&) {
                            found = Kernel::Cores::kWarpgroups ? 2 + Kernel::Cores::kLoader : 1;
                        });
    return found;
}

EXPORT int tensor_core_products(int descending, int64_t shared_bytes, int wgmma, int adder, int64_t N, int64_t K,
                                int64_t D, const Float16* x, const Float16* codes, float* products) {
    const Emulator device = {descending != 0, adder};
    std::vector<double> memory(Packed::bytes(K, D) / 8, NAN);
    return multiply(device, ProductsInputs{N, K, D, x, codes, products, {}}, memory.data(),
                    Abilities{size_t(shared_bytes), Wgmma(wgmma), 1});
}

// The rows of a block and their bounds, as Screen has them: float16 of X in units of `unit`.
template <class Cores>
struct TakeRows {
    typedef RowTile<float, Cores, 64> Rows;
    static constexpr int kThreads = Rows::kThreads;
    typedef typename Rows::Shared Shared;
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
EXPORT void bounds(int wgmma, int adder, int64_t N, int64_t K, int64_t D, const Rows* x, const Rows* codebook,
                   int cosine, double* lower, double* upper, double* exact) {
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
    const SearchInputs<float> given = {{1, N, K, D, cosine != 0}, x->as<float>(), *codebook, RowMask{}};
    const auto take = [&]<class Cores>(Cores) {
        device.launch(TakeRows<Cores>{{given}, packed, stored.data(), unit.data(), row.data()});
    };
    wgmma ? take(WarpgroupCores<1, 2, 3>()) : take(WarpCores<4, 1, 1>());
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
            const float score = score_of(product, unit[n] * tile.unit, tile.start[c]);
            const float low = lower_bound(score, tile.radius[c], row[n]);
            lower[n * K + k] = low;
            upper[n * K + k] = upper_bound(low, tile.start[c], slack_of_start(D), tile.radius[c], row[n]);
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
