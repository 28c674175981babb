// The floating types that tensors and weights come in, widened and narrowed without special instructions.
//
// Everything here is written so that a compiler can vectorise loops over it, and gives the same bits however it does.
#pragma once

#include <cstdint>
#include <cstring>

#include "product/matrix.h"

namespace amalgam {
// Internal linkage on purpose: each translation unit needs its own code, compiled for its own instruction set. With
// external linkage the linker would keep one copy for all, and AVX-512 code could run on a machine without it.
namespace {

constexpr int kLanes = 16;  // of 32 bits: a register's, of every instruction set

// 1.5 * 2^23. Added to a smaller magnitude than 2^22, it leaves the nearest integer in the last bits of the sum.
constexpr float kRounder = 12582912.0f;

struct Bfloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

struct Int8Code {
    int8_t value;
};

struct Fp8Code {  // E4M3
    uint8_t bits;
};

struct E8m0 {  // a power of two, 2^(bits - 127)
    uint8_t bits;
};

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double as_double(uint64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint64_t as_bits(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(float value) { return value; }

inline float widen(Bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// Exponents are moved by adding; infinities and NaN need it twice, and subnormals become exact in a subtraction.
inline float widen(Float16 value) {
    const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t exponent = magnitude & 0x0f800000;
    const uint32_t moved = magnitude + (112u << 23);
    const uint32_t special = magnitude + (224u << 23);
    const uint32_t subnormal = as_bits(as_float(moved + (1u << 23)) - as_float(113u << 23));
    const uint32_t finite = exponent == 0 ? subnormal : moved;
    return as_float((exponent == 0x0f800000 ? special : finite) | sign);
}

// OCP E4M3 without infinities: 1 sign, 4 exponent (bias 7), 3 mantissa bits. NaN codes are not handled: a weight that
// holds one is not packed.
inline float widen_e4m3(uint32_t code) {
    const uint32_t magnitude = code & 0x7f;
    const uint32_t sign = (code & 0x80) << 24;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
    return as_float((magnitude < 8 ? subnormal : normal) | sign);
}

inline float widen(Int8Code code) { return static_cast<float>(code.value); }

inline float widen(Fp8Code code) { return widen_e4m3(code.bits); }

// NaN, 255, is not handled: a weight that holds one is not packed.
inline float widen(E8m0 code) { return as_float(code.bits == 0 ? 0x00400000 : uint32_t{code.bits} << 23); }

// To nearest, ties to even; a NaN stays a quiet NaN.
inline uint16_t bfloat16_bits(float value) {
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

inline void narrow(float value, float* out) { *out = value; }

inline void narrow(float value, Bfloat16* out) { out->bits = bfloat16_bits(value); }

// To nearest, ties to even, infinite above 65504; a NaN stays a quiet NaN. The sum with 1/2 rounds to multiples of
// 2^-24, which subnormal numbers are.
inline uint16_t float16_bits(float value) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f);
    const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    const uint32_t finite = magnitude < 113u << 23 ? subnormal : normal;
    const uint32_t found = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : finite;
    return static_cast<uint16_t>(found | (bits >> 16 & 0x8000));
}

inline void narrow(float value, Float16* out) { out->bits = float16_bits(value); }

// The nearest code, ties to even, of a value within the largest one. Sums round to integers, and to multiples of 2^-9,
// which subnormal codes are.
inline void narrow(float value, Int8Code* out) {
    out->value = static_cast<int8_t>(as_bits(value + kRounder) - as_bits(kRounder));
}

inline void narrow(float value, Fp8Code* out) {
    const uint32_t bits = as_bits(value), magnitude = bits & 0x7fffffff;
    const uint32_t subnormal = as_bits(as_float(magnitude) + 16384.0f) - as_bits(16384.0f);
    const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
    out->bits = static_cast<uint8_t>((magnitude < 121u << 23 ? subnormal : normal) | (bits >> 24 & 0x80));
}

constexpr float largest_code(Int8Code) { return 127.0f; }
constexpr float largest_code(Fp8Code) { return 448.0f; }

// The value as X holds it; exact, and so without work, where X is at least as wide as T.
template <class X, class T>
inline float round_to(T value) {
    if constexpr (sizeof(X) < sizeof(T)) {
        X narrowed;
        narrow(value, &narrowed);
        return widen(narrowed);
    } else {
        return widen(value);
    }
}

inline void widen_all(const void* from, DType dtype, int64_t count, float* to) {
    switch (dtype) {
        case DType::kFloat32:
            std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
            break;
        case DType::kBfloat16:
            for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const Bfloat16*>(from)[i]);
            break;
        case DType::kE8m0:
            for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const E8m0*>(from)[i]);
            break;
        case DType::kFp8:
            for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const Fp8Code*>(from)[i]);
            break;
        default:
            for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const Float16*>(from)[i]);
            break;
    }
}

inline bool is_code(DType dtype) { return dtype == DType::kInt8 || dtype == DType::kFp8; }

inline int64_t dtype_bytes(DType dtype) {
    return dtype == DType::kFloat32 ? 4 : is_code(dtype) || dtype == DType::kE8m0 ? 1 : 2;
}

inline const void* advance(const void* data, DType dtype, int64_t elements) {
    return static_cast<const char*>(data) + elements * dtype_bytes(dtype);
}

inline void* advance(void* data, DType dtype, int64_t elements) {
    return static_cast<char*>(data) + elements * dtype_bytes(dtype);
}

}  // namespace
}  // namespace amalgam
