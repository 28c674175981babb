// A linear weight in panels: what the native products read.
//
// A panel is 16 output rows, one per 32-bit lane; a line is 64 bytes, the next few inputs of all 16 rows. Lines follow
// each other along the inputs, panels along the rows, so that a product reads memory in one direction and never sums
// across lanes. What a lane of a line holds, the header of the format says (formats/).
//
// Inputs are padded to a multiple of what a format packs together, where activations are zero, and rows to a multiple
// of 16. Scales, zero points and offsets stand apart as [panels, groups, 16], scales in their stored type;
// [panels, groups, 1] where the rows of every panel share theirs. Where groups are cut into parts that have integer
// scales of their own, those are pairs of parts: [panels, pairs, bytes of a pair] (formats/nested.h). Lines and all of
// these lie one after the other, each from a 64-byte boundary on.
//
// The same for all instruction sets. Files hold it (composition/packed_cache.py): raise kLayoutVersion with every
// change.
#pragma once

#include <cstdint>

namespace amalgam {

// kInt8 and kFp8 are codes that a KV cache holds, each row with a scale; kFp8 and kE8m0 (a power of two, OCP
// Microscaling 1.0) are scales, too.
enum class DType : int { kFloat32, kBfloat16, kFloat16, kInt8, kFp8, kE8m0 };
enum class Format : int;  // formats/table.h
// What a product multiplies: int8 x int4 or int8 exactly; bfloat16 pairs into float32; float32.
enum class Operand : int { kInt8, kBfloat16, kFloat32 };
// A group's floating offset, of the type of its scale: (code - zero) * scale, or code * scale + minimum. In a format
// with parts the minimum is multiplied by the part's own and subtracted.
enum class Offset : int { kNone, kZero, kMinimum };

constexpr int kLayoutVersion = 3;
constexpr int kPanelRows = 16;
constexpr int kLineBytes = 64;
constexpr int kColumnUnit = 8;  // inputs are padded to a multiple at least
constexpr int kChunk = 128;     // most inputs whose products are summed before they join the total

// A value of a coded weight whose exponent is outside of its panel's window.
struct Exception {
    int32_t column;
    uint16_t lane;
    uint16_t bits;  // bfloat16
};

// To the next line's beginning.
constexpr int64_t align(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

// Of codebooks (formats/codebooks.h): how many, of how many vectors, for how many inputs of a row each.
struct BookSizes {
    int64_t number = 0;
    int64_t vectors = 0;  // a power of two, at most 65536
    int64_t inputs = 0;
    DType dtype = DType::kFloat32;

    int64_t code_bytes() const { return vectors > 256 ? 2 : 1; }
    int64_t vector_bytes() const { return inputs * (dtype == DType::kFloat32 ? 4 : 2); }
    int64_t nbytes() const { return number * vectors * vector_bytes(); }
};

struct Matrix {
    Format format;
    int bytes_per_input;  // of all 16 rows of a panel
    int column_unit;      // inputs are padded to a multiple
    int part;             // inputs that share an integer scale; 0 where the format has none
    int pair_bytes;       // integer scales and minima of two parts of all 16 rows
    Operand operand;      // what a product with bfloat16 activations multiplies
    int64_t rows;
    int64_t columns;
    int64_t group;       // inputs that share a scale; at least columns: one group
    int64_t num_groups;  // 0 where the format has no scale
    const uint8_t* lines;
    const void* scale;
    DType scale_dtype;
    int scale_lanes;      // 16 or 1
    const uint8_t* zero;  // [panels, groups, 16], or null
    const void* offset;   // [panels, groups, 16] of scale_dtype, or null
    Offset offset_kind;
    const uint8_t* parts;  // [panels, pairs, pair_bytes], or null
    // Tables only (formats/table4.h); of other formats, factor and divisor are 1.
    float factor, divisor;  // of every scale
    const float* table;     // [16]
    int8_t looked_up[16];   // the table's values / table_unit
    float table_unit;
    BookSizes book_sizes;     // codebooks only
    const uint8_t* books;     // [number, vectors, inputs], or null
    const int32_t* order;     // packed input → input of the product; null: the same
    const int32_t* position;  // its inverse
    // Coded bfloat16 only (formats/bf16_coded.h). Exceptions of panel p are [exception_starts[p], exception_starts[p +
    // 1]), by column.
    const uint8_t* windows;  // [panels]
    const int32_t* exception_starts;
    const Exception* exceptions;

    int64_t num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    int64_t padded_columns() const { return (columns + column_unit - 1) / column_unit * column_unit; }
    int64_t num_pairs() const { return part > 0 ? padded_columns() / part / 2 : 0; }
    // Whether groups hold whole steps of packed inputs, so that a product can scale the sum of each.
    bool has_even_groups() const { return num_groups <= 1 || group % column_unit == 0; }
    // Whether the values are scaled where they are expanded to bfloat16, instead of the products' sums.
    bool is_scaled_by_value() const { return offset != nullptr || part > 0 || !has_even_groups(); }
    int64_t panel_bytes() const { return padded_columns() * bytes_per_input; }
    const uint8_t* panel(int64_t index) const { return lines + index * panel_bytes(); }
};

// What a product with this weight multiplies when activations come in this type.
inline Operand operand_for(const Matrix& weight, DType x_dtype) {
    return x_dtype == DType::kFloat32 ? Operand::kFloat32 : weight.operand;
}

inline int64_t operand_bytes(Operand operand) {
    return operand == Operand::kInt8 ? 1 : operand == Operand::kBfloat16 ? 2 : 4;
}

// Inputs whose products are summed before they join an output's total: a constant of the weight and the operand, so
// that every row is summed in the same order. It divides the group, because a chunk's sum is multiplied by its scale;
// float32 products have no scale and share one order for all formats.
inline int64_t accumulation_chunk(const Matrix& weight, Operand operand) {
    if (operand == Operand::kFloat32 || weight.num_groups <= 1) return kChunk;
    if (operand == Operand::kBfloat16 && weight.is_scaled_by_value()) return kChunk;
    int64_t chunk = kChunk;
    while (weight.group % chunk != 0) chunk -= weight.column_unit;
    return chunk;
}

}  // namespace amalgam
