// The launches of a search (search.h), for the units that compile them.
#pragma once

#include "search.h"

namespace vqops::cuda {

template <class Device, class T>
bool screen(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
            const Abilities& abilities) {
    return with_nearest_screen(in, out, packed, abilities, [&](const auto& kernel) {
        device.launch(kernel);
        if (kernel.shares > 1) device.launch(MergeLists<T>{in, out, packed, kernel.shares});
    });
}

template <class Device, class T>
bool screen_topk(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
                 const Abilities& abilities) {
    return with_topk_screen(in, out, packed, abilities, [&](const auto& kernel) { device.launch(kernel); });
}

template <class Device, class T>
void scan(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, bool everything,
          int64_t multiprocessors) {
    const int64_t at_once = multiprocessors * Scan<T>::kBlocksAtOnce;
    device.launch(Scan<T>{in, out, everything, (at_once + in.H - 1) / in.H});
}

}  // namespace vqops::cuda
