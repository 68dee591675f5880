// One allocation cut in pieces. A first walk over the pieces, without memory, gives its size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vqops::cuda {

class Memory {
public:
    explicit Memory(void* base = nullptr) : base_(static_cast<char*>(base)) {}

    template <class T>
    T* take(int64_t count) {
        const int64_t offset = size;
        size += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
        return base_ ? reinterpret_cast<T*>(base_ + offset) : nullptr;
    }

    int64_t size = 0;

private:
    char* base_;
};

}  // namespace vqops::cuda
