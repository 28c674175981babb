// The exponential function that all kernels share.
#pragma once

#include <limits>

#include "float_types.h"

namespace amalgam {
namespace {

// e^x to 2 units in the last place (range reduction and polynomial of the Cephes library), the same bits wherever the
// compiler vectorises it. Above 88 it is infinite, below -87 it stays at the smallest normal results.
inline float exponential(float argument) {
    float x = argument > 88.0f ? 88.0f : argument;
    x = x < -87.0f ? -87.0f : x;
    constexpr float kRounder = 12582912.0f;
    const float shifted = x * 1.44269504088896341f + kRounder;
    const float power = shifted - kRounder;
    const float r = (x - power * 0.693359375f) - power * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const float mantissa = (p * (r * r) + r) + 1.0f;
    const float result = mantissa * as_float((as_bits(shifted) - as_bits(kRounder) + 127) << 23);
    return argument > 88.0f ? std::numeric_limits<float>::infinity() : result;
}

}  // namespace
}  // namespace amalgam
