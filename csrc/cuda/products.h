// The products of the tensor cores alone, as the fast pass of the search makes them: a probe of their accumulation,
// which the proof of the search takes for granted (exactness.md). Values are taken as they are.
#pragma once

#include <type_traits>

#include "search.h"

namespace vqops::cuda {

struct ProductsInputs {
    int64_t N, K, D;
    const Float16 *x, *codes;  // [N, D], [K, D]
    float* out;                // [N, K]
    Packed packed;             // zeros, of which the kernels leave all but the codes
};

// The codes in the packed order.
struct LayCodes {
    static constexpr int kThreads = 256;
    struct Shared {};
    ProductsInputs in;

    size_t shared_bytes() const { return 0; }
    int64_t blocks() const { return (in.K * in.D + kThreads - 1) / kThreads; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared&) const {
        block.for_threads([&](int t) {
            const int64_t i = block.index * kThreads + t;
            if (i < in.K * in.D) in.packed.codes[Packed::place(i / in.D, i % in.D, padded(in.D))] = in.codes[i].bits;
        });
    }
};

template <class Cores_, int kPiece>
struct TensorCoreProducts {
    typedef Cores_ Cores;
    typedef CodeTiles<Cores, kPiece> Codes;
    typedef RowTile<Float16, Cores, kPiece> Rows;
    static constexpr bool kAllRegisters = true;
    static constexpr int kThreads = Cores::kThreads, kRows = Cores::kRows;
    struct Shared {
        typename Codes::Stage stages[Cores::kStages];
    };
    ProductsInputs in;

    VQOPS_HOST_DEVICE int64_t width() const { return padded(in.D); }
    size_t shared_bytes() const { return sizeof(Shared) + size_t(kRows * width() * 2); }
    int64_t blocks() const { return (in.N + kRows - 1) / kRows; }

    template <class Block>
    VQOPS_HOST_DEVICE void operator()(Block& block, Shared& shared) const {
        const int64_t first = block.index * kRows;
        uint16_t* const x = reinterpret_cast<uint16_t*>(&shared + 1);  // [kRows, width] as row_tile.h places them
        block.for_threads_sync([&](int t) {
            for (int r = 0; r < kRows; r++)
                for (int64_t i = t; i < width(); i += kThreads)
                    x[Rows::place(r, int(i))] =
                        first + r < in.N && i < in.D ? in.x[(first + r) * in.D + i].bits : uint16_t(0);
        });
        Codes{in.packed, in.K, width(), 0, 1}.each(
            block, shared.stages, x, [&](auto&, int code, const Constants*, auto& products) {
                block.for_threads([&](int t) {
                    ScoresOf<Cores>::each(t, products[t], [&](int own, int tile, int c, float value) {
                        const int64_t n = first + ScoresOf<Cores>::row_of(t, own), k = code + tile * kTile + c;
                        if (n < in.N && k < in.K) in.out[n * in.K + k] = value;
                    });
                });
            });
    }
};

// A loader changes nothing of the products.
template <class Cores>
using AloneOf = std::conditional_t<Cores::kLoader, WarpgroupCores<2, Cores::kRowTiles, Cores::kStages>, Cores>;

// By the tensor cores that the search would take, false if it has no fast pass for this depth. `memory`:
// Packed::bytes(K, D).
template <class Device>
bool multiply(const Device& device, ProductsInputs in, void* memory, const Abilities& abilities) {
    const SearchInputs<Float16> search = {{1, in.N, in.K, in.D, false}, {}, {}, {}};
    return with_nearest_screen(search, {}, {}, abilities,
                               [&]<class Cores, int kPiece>(const Screen<Float16, Cores, kPiece>&) {
                                   Memory pieces(memory);
                                   in.packed = Packed::take(pieces, in.K, in.D);
                                   device.fill(memory, 0, pieces.size);
                                   device.launch(LayCodes{in});
                                   device.launch(TensorCoreProducts<AloneOf<Cores>, kPiece>{in});
                               });
}

}  // namespace vqops::cuda
