// The stable sort of rows by code: CUB's radix sort over the bits that codes have.

#include <cub/device/device_radix_sort.cuh>

#include "launch.h"

namespace vqops::cuda {
namespace {

int bits(int64_t codes) {
    int count = 1;
    while (codes >> count) count++;
    return count;
}

}  // namespace

size_t sort_bytes(int64_t rows, int64_t codes) {
    size_t bytes_needed = 0;
    const uint32_t* in = nullptr;
    uint32_t* out = nullptr;
    check(cub::DeviceRadixSort::SortPairs(nullptr, bytes_needed, in, out, in, out, int(rows), 0, bits(codes)), "vqops");
    return bytes_needed;
}

void Stream::sort(const RowsByCode& s) const {
    size_t bytes_given = s.temporary_bytes;
    const uint32_t *key = s.key, *row = s.row;
    check(cub::DeviceRadixSort::SortPairs(s.temporary, bytes_given, key, s.keys, row, s.order, int(s.rows()), 0,
                                          bits(s.codes()), stream_),
          "vqops");
}

}  // namespace vqops::cuda
