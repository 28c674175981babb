// A linear weight in panels: what the native products read.
//
// A panel is 16 output rows, one per 32-bit lane; a line is 64 bytes, the next few inputs of all 16 rows. Lines follow
// each other along the inputs, panels along the rows, so that a product reads memory in one direction and never sums
// across lanes. One lane of a line, lowest byte first (i0, i1, ... are consecutive inputs):
//
//     int4      i0|i4 i1|i5 i2|i6 i3|i7   low|high nibble      8 inputs, unsigned, zero point 8 unless `zero` is there
//     int8      i0 i1 i2 i3               value + 128          4 inputs
//     fp8       i0 i2 i1 i3               E4M3                 4 inputs
//     bf16      i0 i0 i1 i1                                    2 inputs
//     fp16      i0 i0 i1 i1                                    2 inputs
//     fp32      i0 i0 i0 i0                                    1 input
//
// The seventh format, bfloat16 in 12 bits, takes three lines for 8 inputs: coded.h.
//
// Inputs are padded to a multiple of 8, where activations are zero, and rows to a multiple of 16. Scales and zero
// points stand apart as [panels, groups, 16], scales in their stored type; [panels, groups, 1] where the rows of every
// panel share theirs. Lines, scales and zero points lie one after the other, each from a 64-byte boundary on.
//
// The same for all instruction sets. Files hold it (composition/packed_cache.py): raise kLayoutVersion with every
// change.
#pragma once

#include <cstdint>

namespace amalgam {

enum class DType : int { kFloat32, kBfloat16, kFloat16 };
enum class Format : int { kInt4, kInt8, kFp8, kBfloat16, kFloat16, kFloat32, kCodedBfloat16 };
// What a product multiplies: int8 x int4 or int8 exactly; bfloat16 pairs into float32; float32.
enum class Operand : int { kInt8, kBfloat16, kFloat32 };

constexpr int kLayoutVersion = 2;
constexpr int kPanelRows = 16;
constexpr int kLineBytes = 64;
constexpr int kColumnUnit = 8;  // inputs are padded to a multiple
constexpr int kChunk = 128;     // most inputs whose products are summed before they join the total

// A value of a coded weight whose exponent is outside of its panel's window.
struct Exception {
    int32_t column;
    uint16_t lane;
    uint16_t bits;  // bfloat16
};

// To the next line's beginning.
constexpr int64_t align(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

struct Matrix {
    Format format;
    int64_t rows;
    int64_t columns;
    int64_t group;       // inputs that share a scale; at least columns: one group
    int64_t num_groups;  // 0 where the format has no scale
    const uint8_t* lines;
    const void* scale;
    DType scale_dtype;
    int scale_lanes;          // 16 or 1
    const uint8_t* zero;      // [panels, groups, 16], or null
    const int32_t* order;     // packed input → input of the product; null: the same
    const int32_t* position;  // its inverse
    bool quantizes;           // integer formats: whether bfloat16 activations are quantized to int8
    // Coded bfloat16 only (coded.h). Exceptions of panel p are [exception_starts[p], exception_starts[p + 1]), by
    // column.
    const uint8_t* windows;  // [panels]
    const int32_t* exception_starts;
    const Exception* exceptions;

    int64_t num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    int64_t padded_columns() const { return (columns + kColumnUnit - 1) / kColumnUnit * kColumnUnit; }
    int64_t panel_bytes() const { return padded_columns() * bytes_per_input(format); }
    const uint8_t* panel(int64_t index) const { return lines + index * panel_bytes(); }

    // Of all 16 rows of a panel.
    static constexpr int bytes_per_input(Format format) {
        return format == Format::kCodedBfloat16 ? 3 * kLineBytes / 8 : kLineBytes / inputs_per_line(format);
    }

    static constexpr int inputs_per_line(Format format) {
        switch (format) {
            case Format::kInt4:
                return 8;
            case Format::kInt8:
            case Format::kFp8:
                return 4;
            case Format::kBfloat16:
            case Format::kFloat16:
                return 2;
            default:
                return 1;
        }
    }

    static constexpr int bits(Format format) { return 32 / inputs_per_line(format); }

    // How far input `p` of a line is shifted left within its lane.
    static constexpr int shift(Format format, int64_t p) {
        switch (format) {
            case Format::kInt4:
                return static_cast<int>(p % 4 * 8 + p % 8 / 4 * 4);
            case Format::kInt8:
                return static_cast<int>(p % 4 * 8);
            case Format::kFp8:
                return static_cast<int>(p % 2 * 16 + p % 4 / 2 * 8);
            case Format::kBfloat16:
            case Format::kFloat16:
                return static_cast<int>(p % 2 * 16);
            default:
                return 0;
        }
    }
};

// What a product with this weight multiplies when activations come in this type.
inline Operand operand_for(const Matrix& weight, DType x_dtype) {
    if (x_dtype == DType::kFloat32) return Operand::kFloat32;
    switch (weight.format) {
        case Format::kInt4:
        case Format::kInt8:
            return weight.quantizes ? Operand::kInt8 : Operand::kBfloat16;
        case Format::kFp8:
        case Format::kBfloat16:
        case Format::kCodedBfloat16:
            return Operand::kBfloat16;
        default:
            return Operand::kFloat32;
    }
}

inline int64_t operand_bytes(Operand operand) {
    return operand == Operand::kInt8 ? 1 : operand == Operand::kBfloat16 ? 2 : 4;
}

// Inputs whose products are summed before they join an output's total: a constant of the weight and the operand, so
// that every row is summed in the same order. It divides the group, because a chunk's sum is multiplied by its scale;
// float32 products have no scale and share one order for all formats.
inline int64_t accumulation_chunk(const Matrix& weight, Operand operand) {
    if (operand == Operand::kFloat32 || weight.num_groups <= 1) return kChunk;
    int64_t chunk = kChunk;
    while (weight.group % chunk != 0) chunk -= kColumnUnit;
    return chunk;
}

}  // namespace amalgam
