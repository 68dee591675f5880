// Search: the nearest code of each row, certified exact. Screen takes all rows, Scan those that it queues.
#pragma once

#include "scan.h"
#include "screen.h"
#include "screen_topk.h"

namespace vqops::cuda {

// Limits of the GPU.
struct Abilities {
    size_t shared_bytes;  // that a block may have
    bool wgmma;           // and the kernels are compiled for it
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

template <class Kernel>
int64_t shares_in(const Kernel& kernel) {
    if constexpr (requires { kernel.shares; }) return kernel.shares;
    else return 1;
}

// body(kernel) with the fast pass for this depth and k, false if none fits.
template <class T, class Body>
bool with_screen(const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
                 const Abilities& abilities, const Body& body) {
    const int64_t width = padded(in.D);
    const auto fits = [&](auto kernel) {
        if (kernel.shared_bytes() > abilities.shared_bytes) return false;
        if constexpr (requires { kernel.shares; }) kernel.shares = shares_of(kernel, abilities);
        body(kernel);
        return true;
    };
    if (out.distances) {
        if (out.k > kLargestK) return false;
        if (width == 16) return fits(ScreenTopk<T, 16, 4>{in, out, packed});
        if (width == 32) return fits(ScreenTopk<T, 32, 4>{in, out, packed});
        return fits(ScreenTopk<T, 64, 4>{in, out, packed}) || fits(ScreenTopk<T, 64, 2>{in, out, packed});
    }
    if (width == 16) return fits(Screen<T, WarpCores<4, 2, 3>, 16>{in, out, packed, 1});
    if (width == 32) return fits(Screen<T, WarpCores<4, 2, 3>, 32>{in, out, packed, 1});
    if (abilities.wgmma && width <= 512) {
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

// One search. The fast pass takes all rows and Scan those that it queues, or all where it does not fit or there
// is no packed codebook.
template <class Device, class T>
void search(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
            const Abilities& abilities) {
    bool screened = false;
    if (packed.memory) {
        device.fill(out.queued, 0, in.H * int64_t(sizeof(int32_t)));
        screened = with_screen(in, out, packed, abilities, [&](const auto& kernel) {
            device.launch(kernel);
            if (shares_in(kernel) > 1) device.launch(MergeLists<T>{in, out, packed, shares_in(kernel)});
        });
    }
    const Scan<T> scan = {in, out, !screened};
    device.launch(scan);
    device.launch(MergeParts<T>{scan});
}

}  // namespace vqops::cuda
