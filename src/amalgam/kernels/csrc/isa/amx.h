// AVX-512 and Intel's AMX. Products on its tiles are in product/unit.h; amx_emulated.h says what the instructions do.
#pragma once

#include "isa/avx512_bf16.h"
#include "product/tile.h"

namespace amalgam {
namespace {

constexpr int64_t kMinWideRows = 9, kMinWidePartsRows = 16;  // what the unit leaves

// Assembly, because the compilers' intrinsics take a tile's number as text, and not all of them know that the
// instructions read and write memory.
template <>
struct MatrixUnit<> {
    static constexpr bool kExists = true;
    static constexpr int kPanels = 2;

    static void configure(int rows) {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = kLineBytes;
            config.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows : kPanelRows);
        }
        asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    static void release() { asm volatile("tilerelease" ::: "memory"); }

    template <int kTile>
    static void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    template <int kTile>
    static void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kTile>
    static void store(void* to, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kSum, int kRows, int kLines>
    static void dot_int8() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kLines));
    }
    template <int kSum, int kRows, int kLines>
    static void dot_bfloat16() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kRows), "i"(kLines));
    }
};

}  // namespace
}  // namespace amalgam
