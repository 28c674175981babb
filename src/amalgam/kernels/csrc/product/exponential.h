// The exponential function that all kernels share.
#pragma once

#include <limits>

#include "isa/float_types.h"

namespace amalgam {
namespace {

// e^x to 2 units in the last place (range reduction and polynomial of the Cephes library), the same bits wherever the
// compiler vectorises it. Above 88 it is infinite, below -87 it stays at the smallest normal results.
inline float exponential(float argument) {
    float x = argument > 88.0f ? 88.0f : argument;
    x = x < -87.0f ? -87.0f : x;
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

// cap * tanh(x / cap): (1 + tanh(a)) / 2 = sigmoid(2 a). A NaN stays.
inline float soft_cap(float x, float cap) { return cap - 2.0f * cap / (1.0f + exponential(2.0f / cap * x)); }

// e^x for x <= 0 to 2 units in the last place, 0 below -708: Cody and Waite's range reduction, then the Taylor series,
// whose first omitted term is below 10^-17.
inline double exponential_below_0(double argument) {
    const double x = argument < -708.0 ? -708.0 : argument;
    constexpr double kDoubleRounder = 6755399441055744.0;  // 1.5 * 2^52, as kRounder
    const double shifted = x * 1.4426950408889634 + kDoubleRounder;
    const double power = shifted - kDoubleRounder;
    const double r = (x - power * 6.93145751953125e-1) - power * 1.42860682030941723212e-6;
    double p = 1.0 / 6227020800.0;
    p = p * r + 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const double result = p * as_double((as_bits(shifted) - as_bits(kDoubleRounder) + 1023) << 52);
    return argument < -708.0 ? 0.0 : result;
}

}  // namespace
}  // namespace amalgam
