// Rows of a tensor of any floating dtype and stride, read as float or double.
#pragma once

#include <cstdint>
#include <cstring>

namespace vqops {

enum class DType { float32, float64, float16, bfloat16 };

// A tensor [H, rows, D], by strides in elements.
struct Rows {
    const void* data;
    DType dtype;
    int64_t head_stride, row_stride, stride;

    int64_t at(int64_t h, int64_t n) const { return h * head_stride + n * row_stride; }

    // Whether a row is D floats side by side, and where it begins then.
    bool has_float_rows() const { return dtype == DType::float32 && stride == 1; }
    const float* floats(int64_t h, int64_t n) const { return static_cast<const float*>(data) + at(h, n); }
};

static inline float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Exact for all 65536 patterns: the exponent is rebased by a multiplication, which also normalises denormals.
static inline float from_float16(uint16_t bits) {
    const uint32_t magnitude = uint32_t(bits & 0x7fff) << 13;
    const uint32_t rebase = 0x77800000;  // 2^112
    float value, factor;
    std::memcpy(&value, &magnitude, 4);
    std::memcpy(&factor, &rebase, 4);
    value *= factor;
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    if ((bits & 0x7c00) == 0x7c00) wide = magnitude | 0x7f800000;
    wide |= uint32_t(bits & 0x8000) << 16;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Round to nearest, ties to even, as torch converts.
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline uint16_t to_float16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
    if (bits < 0x38800000) {                       // below 2^-14: adding 1/2 leaves the denormal in the low bits
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return sign | uint16_t(bits - 0x3f000000);
    }
    bits += 0xfff + ((bits >> 13) & 1) - (112u << 23);
    return sign | uint16_t(bits >> 13);
}

// Rows side by side have a loop of their own, so that it is compiled to vectors.
template <class T, class Stored, class Convert>
static inline void read_values(const void* data, int64_t start, int64_t stride, int64_t D, T* out, Convert convert) {
    const Stored* p = static_cast<const Stored*>(data) + start;
    if (stride == 1)
        for (int64_t i = 0; i < D; i++) out[i] = T(convert(p[i]));
    else
        for (int64_t i = 0; i < D; i++) out[i] = T(convert(p[i * stride]));
}

template <class T>
static inline void read_row(const Rows& rows, int64_t h, int64_t n, int64_t D, T* out) {
    const int64_t start = rows.at(h, n);
    const auto same = [](auto value) { return value; };
    switch (rows.dtype) {
        case DType::float32: return read_values<T, float>(rows.data, start, rows.stride, D, out, same);
        case DType::float64: return read_values<T, double>(rows.data, start, rows.stride, D, out, same);
        case DType::float16: return read_values<T, uint16_t>(rows.data, start, rows.stride, D, out, from_float16);
        case DType::bfloat16: return read_values<T, uint16_t>(rows.data, start, rows.stride, D, out, from_bfloat16);
    }
}

// The value of a tensor [H, N] or [H, N, 1].
template <class T>
static inline T read_value(const Rows& rows, int64_t h, int64_t n) {
    T value = 0;
    read_row(rows, h, n, 1, &value);
    return value;
}

// Writes a contiguous row of the dtype; `row` counts rows of D from `data`.
template <class T>
static inline void write_row(void* data, DType dtype, int64_t row, int64_t D, const T* values) {
    switch (dtype) {
        case DType::float32: {
            float* p = static_cast<float*>(data) + row * D;
            for (int64_t i = 0; i < D; i++) p[i] = float(values[i]);
            break;
        }
        case DType::float64: {
            double* p = static_cast<double*>(data) + row * D;
            for (int64_t i = 0; i < D; i++) p[i] = double(values[i]);
            break;
        }
        case DType::float16: {
            uint16_t* p = static_cast<uint16_t*>(data) + row * D;
            for (int64_t i = 0; i < D; i++) p[i] = to_float16(float(values[i]));
            break;
        }
        case DType::bfloat16: {
            uint16_t* p = static_cast<uint16_t*>(data) + row * D;
            for (int64_t i = 0; i < D; i++) p[i] = to_bfloat16(float(values[i]));
            break;
        }
    }
}

// A row as float: in place where it lies so in memory, else copied to `buffer`. Not for float64.
static inline const float* float_row(const Rows& rows, int64_t h, int64_t n, int64_t D, float* buffer) {
    if (rows.has_float_rows()) return rows.floats(h, n);
    read_row(rows, h, n, D, buffer);
    return buffer;
}

}  // namespace vqops
