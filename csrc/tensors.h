// Views of tensors: [H, rows, D] of any floating dtype and stride, indices, masks; float16 and bfloat16 as bits.
#pragma once

#include "host_device.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace vqops {

struct Float16 {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

VQOPS_HOST_DEVICE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

VQOPS_HOST_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

VQOPS_HOST_DEVICE float real(float value) { return value; }
VQOPS_HOST_DEVICE double real(double value) { return value; }
VQOPS_HOST_DEVICE float real(BFloat16 value) { return float_of(uint32_t(value.bits) << 16); }

VQOPS_HOST_DEVICE float real(Float16 value) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(value.bits));
#else
    // Exact for all patterns: 2^112 rebases the exponent, and normalises what float16 holds as a denormal.
    const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, sign = uint32_t(value.bits & 0x8000) << 16;
    const uint32_t rebased = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | ((value.bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : rebased));
#endif
}

// To nearest, ties to even, as torch converts.
template <class T>
VQOPS_HOST_DEVICE T rounded(double value);

template <>
VQOPS_HOST_DEVICE float rounded<float>(double value) {
    return float(value);
}
template <>
VQOPS_HOST_DEVICE double rounded<double>(double value) {
    return value;
}
template <>
VQOPS_HOST_DEVICE BFloat16 rounded<BFloat16>(double value) {
    const uint32_t bits = bits_of(float(value));
    if (value != value) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
VQOPS_HOST_DEVICE Float16 rounded<Float16>(double value) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(float(value)))};
#else
    uint32_t bits = bits_of(float(value));
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // 65520 and above
    // Below 2^-14 adding 1/2 leaves the denormal in the low bits.
    if (bits < 0x38800000) return {uint16_t(sign | (bits_of(float_of(bits) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (bits + 0xfff + ((bits >> 13) & 1) - (112u << 23)) >> 13)};
#endif
}

enum class DType : int { float32, float64, float16, bfloat16 };

VQOPS_HOST_DEVICE int64_t bytes_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// body(T()) with the type of the values.
template <class Body>
void with_type(DType type, const Body& body) {
    switch (type) {
        case DType::float32: return body(float());
        case DType::float64: return body(double());
        case DType::float16: return body(Float16());
        case DType::bfloat16: return body(BFloat16());
    }
}

// A tensor [H, rows, D], by strides in elements.
template <class T>
struct Typed {
    const T* data;
    int64_t head_stride, row_stride, stride;

    VQOPS_HOST_DEVICE int64_t offset(int64_t h, int64_t n) const { return h * head_stride + n * row_stride; }
    VQOPS_HOST_DEVICE auto at(int64_t offset, int64_t i) const { return real(data[offset + i * stride]); }
};

// The same of a dtype that is asked at run time.
struct Rows {
    const void* data;
    DType dtype;
    int64_t head_stride, row_stride, stride;

    VQOPS_HOST_DEVICE int64_t offset(int64_t h, int64_t n) const { return h * head_stride + n * row_stride; }
    // body(values) with their type, which is asked once for many reads.
    template <class Body>
    VQOPS_HOST_DEVICE auto with_type(const Body& body) const {
        switch (dtype) {
            case DType::float32: return body(static_cast<const float*>(data));
            case DType::float64: return body(static_cast<const double*>(data));
            case DType::float16: return body(static_cast<const Float16*>(data));
            default: return body(static_cast<const BFloat16*>(data));
        }
    }
    VQOPS_HOST_DEVICE double at(int64_t offset, int64_t i) const {
        return with_type([&](const auto* values) { return double(real(values[offset + i * stride])); });
    }
    template <class T>
    Typed<T> as() const {
        return {static_cast<const T*>(data), head_stride, row_stride, stride};
    }

    // The same, whose row 0 of head 0 is row n of head h of these.
    Rows from(int64_t h, int64_t n) const {
        return {static_cast<const char*>(data) + offset(h, n) * bytes_of(dtype), dtype, head_stride, row_stride, stride};
    }

    // Whether a row is D floats side by side, and where it begins then.
    bool has_float_rows() const { return dtype == DType::float32 && stride == 1; }
    const float* floats(int64_t h, int64_t n) const { return static_cast<const float*>(data) + offset(h, n); }
};

VQOPS_HOST_DEVICE void write_value(void* data, DType dtype, int64_t place, double value) {
    switch (dtype) {
        case DType::float32: static_cast<float*>(data)[place] = float(value); break;
        case DType::float64: static_cast<double*>(data)[place] = value; break;
        case DType::float16: static_cast<Float16*>(data)[place] = rounded<Float16>(value); break;
        case DType::bfloat16: static_cast<BFloat16*>(data)[place] = rounded<BFloat16>(value); break;
    }
}

// int64 [H, N].
struct Indices {
    const int64_t* data;
    int64_t head_stride, row_stride, K;

    VQOPS_HOST_DEVICE int64_t given(int64_t h, int64_t n) const { return data[h * head_stride + n * row_stride]; }
    // -1 also for what is no code, so that a wrong index reads nothing.
    VQOPS_HOST_DEVICE int64_t at(int64_t h, int64_t n) const {
        const int64_t k = given(h, n);
        return k >= 0 && k < K ? k : -1;
    }
};

// bool [H, N].
struct RowMask {
    const bool* data;  // null: every row
    int64_t head_stride, row_stride;

    VQOPS_HOST_DEVICE bool keeps(int64_t h, int64_t n) const {
        return !data || data[h * head_stride + n * row_stride];
    }
};

}  // namespace vqops
