// Search: the nearest code of each row, certified exact. Screen takes all rows, Scan those that it queues.
#pragma once

#include "prepare.h"
#include "scan.h"
#include "screen.h"
#include "screen_topk.h"

namespace vqops::cuda {

// The products of 32 < D <= 512 on sm_90a, if the kernels are compiled for it: by mma.sync, as elsewhere; by wgmma of
// blocks without a loader or with one.
enum class Wgmma : int32_t { none, alone, loaded };

// Limits of the GPU.
struct Abilities {
    size_t shared_bytes;  // that a block may have
    Wgmma wgmma;
    int64_t multiprocessors;
};

// Blocks that share the codes of the same rows, so that a few rows keep a GPU busy too. Each rounds the rows again: a
// share is four tiles or more.
template <class Kernel>
int64_t shares_of(const Kernel& kernel, const Abilities& gpu) {
    const int64_t at_once = gpu.multiprocessors * (2 * kernel.shared_bytes() < gpu.shared_bytes ? 2 : 1);
    const int64_t alone = kernel.blocks(), fitting = alone > 0 ? at_once / alone : 1;
    const int64_t most = kernel.in.K / (4 * Kernel::Cores::kCodes);
    return most < 2 || fitting < 2 ? 1 : fitting < most ? fitting : most;
}

// body(kernel) if its shared memory fits.
template <class Kernel, class Body>
bool with_kernel(Kernel kernel, const Abilities& abilities, const Body& body) {
    if (kernel.shared_bytes() > abilities.shared_bytes) return false;
    if constexpr (requires { kernel.shares; }) kernel.shares = shares_of(kernel, abilities);
    body(kernel);
    return true;
}

// body(kernel) with the fast pass for this depth, false if none fits.
template <class T, class Body>
bool with_nearest_screen(const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
                         const Abilities& abilities, const Body& body) {
    const int64_t width = padded(in.D);
    const auto fits = [&](const auto& kernel) { return with_kernel(kernel, abilities, body); };
    if (width == 16) return fits(Screen<T, WarpCores<4, 2, 3>, 16>{in, out, packed, 1});
    if (width == 32) return fits(Screen<T, WarpCores<4, 2, 3>, 32>{in, out, packed, 1});
    if (abilities.wgmma == Wgmma::loaded && width <= 512) {
        if (width <= 256) return fits(Screen<T, LoadedCores<2, 3>, 64>{in, out, packed, 1});
        return fits(Screen<T, LoadedCores<1, 4>, 64>{in, out, packed, 1});
    }
    if (abilities.wgmma == Wgmma::alone && width <= 512) {
        // Two blocks of 128 rows an SM: one multiplies while the other compares. 256 rows where that is not the limit.
        if (width <= 128) return fits(Screen<T, WarpgroupCores<1, 2, 3>, 64>{in, out, packed, 1});
        if (width <= 256) return fits(Screen<T, WarpgroupCores<2, 2, 3>, 64>{in, out, packed, 1});
        return fits(Screen<T, WarpgroupCores<2, 1, 4>, 64>{in, out, packed, 1});
    }
    // Two blocks of an SM hide each other's loads: beyond 256 dimensions only the smaller ones fit twice.
    if (width <= 256 && fits(Screen<T, WarpCores<4, 2, 3>, 64>{in, out, packed, 1})) return true;
    // 32 rows read the codes twice as often as 64, and yet in far less time than float64 takes.
    return fits(Screen<T, WarpCores<4, 1, 2>, 64>{in, out, packed, 1}) ||
           fits(Screen<T, WarpCores<2, 1, 2>, 64>{in, out, packed, 1});
}

// The same with the k nearest.
template <class T, class Body>
bool with_topk_screen(const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
                      const Abilities& abilities, const Body& body) {
    const int64_t width = padded(in.D);
    const auto fits = [&](const auto& kernel) { return with_kernel(kernel, abilities, body); };
    if (out.k > kLargestK) return false;
    if (width == 16) return fits(ScreenTopk<T, 16, 4>{in, out, packed});
    if (width == 32) return fits(ScreenTopk<T, 32, 4>{in, out, packed});
    return fits(ScreenTopk<T, 64, 4>{in, out, packed}) || fits(ScreenTopk<T, 64, 2>{in, out, packed});
}

// The shares of its codes that the fast pass works in, 0 if none fits.
template <class T>
int64_t search_shares(const SearchInputs<T>& in, const SearchOutputs& out, const Abilities& abilities) {
    int64_t shares = 0;
    const auto ask = [&](const auto& kernel) {
        if constexpr (requires { kernel.shares; }) shares = kernel.shares;
        else shares = 1;
    };
    out.distances ? with_topk_screen(in, out, {}, abilities, ask) : with_nearest_screen(in, out, {}, abilities, ask);
    return shares;
}

// The launches, defined in passes.h: nvcc takes minutes for them all, and so compiles them by dtype, in search/.
// The fast passes are false if none fits; scan() takes the rows that they queue, or `everything`.
template <class Device, class T>
bool screen(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
            const Abilities& abilities);
template <class Device, class T>
bool screen_topk(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
                 const Abilities& abilities);
template <class Device, class T>
void scan(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, bool everything,
          int64_t multiprocessors);

// The counters of SearchOutputs, one behind the other.
inline int64_t counters_of(int64_t H, int64_t N) { return H * (1 + shared_groups(N)); }

// One search, without a fast pass where there is no memory for a packed codebook.
template <class Device, class T>
void search(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
            bool prepared, const Abilities& abilities) {
    const Counters counters = {out.queued, counters_of(in.H, in.N)};
    if (packed.memory && !prepared) pack_codebook(device, packed, counters);
    else device.fill(counters.data, 0, counters.count * int64_t(sizeof(int32_t)));
    bool screened = false;
    if (packed.memory)
        screened = out.distances ? screen_topk(device, in, out, packed, abilities)
                                 : screen(device, in, out, packed, abilities);
    scan(device, in, out, !screened, abilities.multiprocessors);
}

}  // namespace vqops::cuda
