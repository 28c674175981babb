// The portable primitives and AMX's instructions in plain C++, so that any machine runs the code of AMX: bit for bit as
// Intel's manual has them (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBSUD, TDPBF16PS).
// Far too slow for anything but tests.
#pragma once

#include <cmath>

#include "isa/portable.h"
#include "product/tile.h"

namespace amalgam {
namespace {

template <>
struct MatrixUnit<> {
    static constexpr bool kExists = true;
    static constexpr int kPanels = 2;

    // From here on tiles 0 to 5, sums and activations, have `rows` rows, tiles 6 and 7, weights, 16; all are zero. The
    // thread's own, and only until `release`.
    static void configure(int rows) {
        rows_ = rows;
        std::memset(tiles_, 0, sizeof tiles_);
    }
    static void release() { rows_ = 0; }

    template <int kTile>
    static void zero() {
        std::memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
    }
    // The tile's rows, of 64 bytes each, `stride` bytes from row to row. Other memory is not touched.
    template <int kTile>
    static void load(const void* from, int64_t stride) {
        for (int row = 0; row < rows_of(kTile); ++row) {
            std::memcpy(tiles_[kTile][row], static_cast<const uint8_t*>(from) + row * stride, kLineBytes);
        }
    }
    template <int kTile>
    static void store(void* to, int64_t stride) {
        for (int row = 0; row < rows_of(kTile); ++row) {
            std::memcpy(static_cast<uint8_t*>(to) + row * stride, tiles_[kTile][row], kLineBytes);
        }
    }
    // sum[row][lane] += rows[row] · lines[..][lane], exact: signed bytes times unsigned ones.
    template <int kSum, int kRows, int kLines>
    static void dot_int8() {
        int32_t w[kLineBytes][kPanelRows];
        for (int i = 0; i < kLineBytes; ++i) {
            for (int lane = 0; lane < kPanelRows; ++lane) w[i][lane] = tiles_[kLines][i / 4][4 * lane + i % 4];
        }
        for (int row = 0; row < rows_; ++row) {
            int32_t sum[kPanelRows];
            std::memcpy(sum, tiles_[kSum][row], sizeof sum);
            for (int i = 0; i < kLineBytes; ++i) {
                const int32_t x = static_cast<int8_t>(tiles_[kRows][row][i]);
                for (int lane = 0; lane < kPanelRows; ++lane) sum[lane] += x * w[i][lane];
            }
            std::memcpy(tiles_[kSum][row], sum, sizeof sum);
        }
    }
    // The same with pairs of bfloat16. First and second inputs have sums of their own, from zero; these are added up
    // and then join the tile's. Every result is rounded to nearest; subnormal numbers count as zero.
    template <int kSum, int kRows, int kLines>
    static void dot_bfloat16() {
        float w[2 * kPanelRows][kPanelRows];
        for (int i = 0; i < 2 * kPanelRows; ++i) {
            for (int lane = 0; lane < kPanelRows; ++lane) {
                w[i][lane] = bfloat16(tiles_[kLines][i / 2] + 4 * lane + i % 2 * 2);
            }
        }
        for (int row = 0; row < rows_; ++row) {
            float sum[2][kPanelRows] = {}, total[kPanelRows];
            for (int i = 0; i < 2 * kPanelRows; ++i) multiply(bfloat16(tiles_[kRows][row] + 2 * i), w[i], sum[i % 2]);
            std::memcpy(total, tiles_[kSum][row], sizeof total);
            for (int lane = 0; lane < kPanelRows; ++lane) {
                total[lane] = normal(normal(total[lane]) + normal(sum[0][lane] + sum[1][lane]));
            }
            std::memcpy(tiles_[kSum][row], total, sizeof total);
        }
    }

 private:
    static int rows_of(int tile) { return tile < 6 ? rows_ : kPanelRows; }

    // Zero for subnormal numbers.
    static float normal(float value) {
        const uint32_t bits = as_bits(value), sign = bits & 0x80000000;
        return as_float((bits ^ sign) < 0x00800000 ? sign : bits);
    }
    static float bfloat16(const uint8_t* from) {
        Bfloat16 value;
        std::memcpy(&value, from, sizeof value);
        return normal(widen(value));
    }
    // sum[lane] = x w[lane] + sum[lane], rounded once.
    static void multiply(float x, const float* w, float* sum) {
        // Products are exact, unless they are too small or too large for a float.
        float product[kPanelRows];
        uint32_t num_inexact = 0;
        for (int lane = 0; lane < kPanelRows; ++lane) {
            product[lane] = x * w[lane];
            const uint32_t exponent = as_bits(product[lane]) >> 23 & 0xff;
            num_inexact += exponent - 1 >= 0xfe && x != 0.0f && w[lane] != 0.0f;
        }
        if (num_inexact == 0) {
            for (int lane = 0; lane < kPanelRows; ++lane) sum[lane] = normal(sum[lane] + product[lane]);
        } else {
            for (int lane = 0; lane < kPanelRows; ++lane) sum[lane] = normal(std::fma(x, w[lane], sum[lane]));
        }
    }

    static thread_local int rows_;
    alignas(64) static thread_local uint8_t tiles_[8][kPanelRows][kLineBytes];
};

thread_local int MatrixUnit<>::rows_ = 0;
alignas(64) thread_local uint8_t MatrixUnit<>::tiles_[8][kPanelRows][kLineBytes] = {};

}  // namespace
}  // namespace amalgam
