// One allocation cut in pieces. A first walk over the pieces, without memory, gives its size.
#pragma once

#include "../host_device.h"

namespace vqops::cuda {

constexpr int64_t kAlignment = 256;

class Memory {
public:
    VQOPS_HOST_DEVICE explicit Memory(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    template <class T>
    VQOPS_HOST_DEVICE T* take(int64_t count) {
        const int64_t offset = size;
        size += (count * int64_t(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
        return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
    }

    int64_t size = 0;

private:
    char* base_;
};

}  // namespace vqops::cuda
