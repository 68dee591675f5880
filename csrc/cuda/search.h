// Search: the nearest code of each row, certified exact. Screen takes all rows, Exhaustive those that it leaves.
#pragma once

#include "exhaustive.h"
#include "screen.h"

namespace vqops::cuda {

// What one search runs. row_tiles: 2 or 1 of Screen, or 0 to compare everything in float64, as several nearest do.
template <class Device, class T>
void search(const Device& device, const SearchInputs<T>& in, const SearchOutputs& out, const Preparation& packed,
            int row_tiles) {
    if (row_tiles != 0 && out.k == 1 && !out.distances) {
        device.fill(out.how_many, 0, in.H * int64_t(sizeof(int32_t)));
        if (row_tiles == 2) device.launch(Screen<T, 2>{in, out, packed});
        else device.launch(Screen<T, 1>{in, out, packed});
        device.launch(Exhaustive<T>{in, out, false});
    } else {
        device.launch(Exhaustive<T>{in, out, true});
    }
}

}  // namespace vqops::cuda
