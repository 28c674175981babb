// Which tiles of a matrix unit (MatrixUnit in tile.h) hold what: up to two tiles of rows times two of lines at once, so
// that each tile that is loaded is multiplied twice.
//
//                  16 lines of 64 bytes,
//                  of two panels
//                      ┌───────┬───────┐
//                      │ 6     │ 7     │
//                      └───────┴───────┘
//     up to 16     ┌───┬───────┬───────┐
//     rows of      │ 4 │ 0     │ 1     │   sums, int32 or float32: [rows][16]
//     64 bytes,    ├───┼───────┼───────┤
//     twice        │ 5 │ 2     │ 3     │
//                  └───┴───────┴───────┘
//
// A step is one such product: 64 int8 or 32 bfloat16 inputs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "product/tile.h"

namespace amalgam {
namespace {

constexpr int kUnitRows = 16;  // of a tile

// Rows cut into tiles of equal height, so that the unit is set up once. The last tile may reach beyond the rows.
struct RowTiles {
    int64_t count, height;

    explicit RowTiles(int64_t rows)
        : count((rows + kUnitRows - 1) / kUnitRows), height(count > 0 ? (rows + count - 1) / count : 0) {}
};

// function(number, tile of rows, panel) with every tile of sums; the number is a constant.
template <int kTiles, int kPanels, class Function>
inline void each_sum(Function&& function) {
    function(std::integral_constant<int, 0>{}, 0, 0);
    if constexpr (kPanels > 1) function(std::integral_constant<int, 1>{}, 0, 1);
    if constexpr (kTiles > 1) function(std::integral_constant<int, 2>{}, 1, 0);
    if constexpr (kTiles > 1 && kPanels > 1) function(std::integral_constant<int, 3>{}, 1, 1);
}

template <class Unit, Operand kOperand, int kSum, int kRows, int kLines>
inline void add_product() {
    if constexpr (kOperand == Operand::kInt8) {
        Unit::template dot_int8<kSum, kRows, kLines>();
    } else {
        Unit::template dot_bfloat16<kSum, kRows, kLines>();
    }
}

// A step: sums += rows × lines. rows, lines: where their tiles are; strides in bytes.
template <class Unit, Operand kOperand, int kTiles, int kPanels, class T>
inline void multiply_step(const T* const (&rows)[2], int64_t row_stride, const T* const (&lines)[2],
                          int64_t line_stride) {
    Unit::template load<4>(rows[0], row_stride);
    Unit::template load<6>(lines[0], line_stride);
    add_product<Unit, kOperand, 0, 4, 6>();
    if constexpr (kPanels > 1) {
        Unit::template load<7>(lines[1], line_stride);
        add_product<Unit, kOperand, 1, 4, 7>();
    }
    if constexpr (kTiles > 1) {
        Unit::template load<5>(rows[1], row_stride);
        add_product<Unit, kOperand, 2, 5, 6>();
        if constexpr (kPanels > 1) add_product<Unit, kOperand, 3, 5, 7>();
    }
}

}  // namespace
}  // namespace amalgam
