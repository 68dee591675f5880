// The tensor cores that multiply in a block of the search, of warps or of warpgroups, and their tiles.
#pragma once

#include <cstdint>

#include "../host_device.h"

namespace vqops::cuda {

// mma.sync, which every GPU from sm_80 has: warps, each with 16 * kRowTiles rows and 64 codes.
template <int kWarps, int kRowTiles_, int kStages_>
struct WarpCores {
    static constexpr bool kWarpgroups = false;
    static constexpr int kThreads = 32 * kWarps, kRowTiles = kRowTiles_, kRows = 16 * kWarps * kRowTiles, kCodes = 64;
    static constexpr int kStages = kStages_, kLag = 1;  // a stage is free when all have multiplied it
    static constexpr bool kLoader = false;

    // The first row of a thread's row tile.
    static VQOPS_HOST_DEVICE int row_of(int t, int i) { return (t / 32 * kRowTiles + i) * 16; }
};

// wgmma, which sm_90a has: groups of 4 warps, each with 64 * kRowTiles rows and 128 codes, both in shared memory. 64
// codes would read as many bytes of rows as of codes and meet the limit of shared memory.
template <int kGroups, int kRowTiles_, int kStages_>
struct WarpgroupCores {
    static constexpr bool kWarpgroups = true;
    static constexpr int kThreads = 128 * kGroups, kRowTiles = kRowTiles_, kRows = 64 * kGroups * kRowTiles;
    static constexpr int kCodes = 128;
    static constexpr int kStages = kStages_, kLag = 2;  // the products of a stage run on while the next is waited for

    static constexpr bool kLoader = false;

    // The first row of a group's row tile, and of a thread's in it.
    static VQOPS_HOST_DEVICE int group_row(int group, int i) { return ((kGroups > 1 ? group * kRowTiles : 0) + i) * 64; }
    static VQOPS_HOST_DEVICE int row_of(int t, int i) { return group_row(t / 128, i) + t % 128 / 32 * 16; }
};

// The same with two groups that multiply and compare in turn, and a loader beside them (block.h).
template <int kRowTiles_, int kStages_>
struct LoadedCores : WarpgroupCores<2, kRowTiles_, kStages_> {
    static constexpr bool kLoader = true;
    static constexpr int kLaunched = 128 + WarpgroupCores<2, kRowTiles_, kStages_>::kThreads;
    static_assert(128 * 24 + 256 * 240 == kLaunched * 168);  // registers, see wgmma.h: of more the workers would wait
};

}  // namespace vqops::cuda
