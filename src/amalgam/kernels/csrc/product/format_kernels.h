// What products in this instruction set need to know of a format.
//
// The loops behind it take long to compile. isa/formats.cpp does it in parts, each a translation unit with some of the
// formats, so that a build on several cores takes less time.
#pragma once

#include "formats/table.h"
#include "product/kernels.h"
#include "product/tile.h"

namespace amalgam {

inline namespace AMALGAM_ISA {

// Where a format puts the chunks of a run that products with several panels at once and matrix units read
// (formats/byte_lines.h).
struct ByteLines {
    uint8_t* bytes;                   // lines
    float (*factors)[2][kPanelRows];  // of each chunk, as GroupFactors has them
    // Of formats with parts:
    int32_t (*first)[kPanelRows] = nullptr;        // of each chunk: what is added to its sum
    int32_t (*part_scales)[kPanelRows] = nullptr;  // of each part
    int16_t (*minima)[2 * kPanelRows] = nullptr;   // of each two parts
};

struct FormatKernels {
    Operand operand;
    int bytes_per_input;
    float scale_factor;
    int64_t direct_rows, tile_rows;
    void (*expand_floats)(const Matrix&, int64_t panel, int64_t first, int64_t end, float* out);
    void (*expand_pairs)(const Matrix&, int64_t panel, int64_t first, int64_t end, uint8_t* out);
    void (*add_exceptions)(const Matrix&, int64_t panel, const Activations&, int64_t first_row, int64_t rows,
                           float (*sums)[kPanelRows]);             // or null
    const uint8_t* (*expand_bytes)(const Run&, const ByteLines&);  // returns the lines of bytes; or null
    int32_t byte_zero;                                             // what the bytes are too large by, without parts
    TileFunction tiles[kMaxTileRows];                              // by number of rows, from 1 on
};

constexpr int kFormatParts = 3;  // CMakeLists.txt has as many

// Of formats whose number leaves kPart when it is divided by kFormatParts; null for others.
template <int kPart>
const FormatKernels* kernels_in_part(Format format);

}  // namespace AMALGAM_ISA

namespace {

inline const FormatKernels& kernels_of(Format format) {
    static constexpr decltype(&kernels_in_part<0>) kParts[kFormatParts] = {kernels_in_part<0>, kernels_in_part<1>,
                                                                           kernels_in_part<2>};
    return *kParts[static_cast<int>(format) % kFormatParts](format);
}

inline Run whole_panel(const Matrix& w, const FormatKernels& format, Operand operand, int64_t panel) {
    Run run{};
    run.chunk = accumulation_chunk(w, operand);
    run.padded_columns = w.padded_columns();
    run.end_chunk = (run.padded_columns + run.chunk - 1) / run.chunk;
    const bool is_scaled = operand == Operand::kFloat32 || (operand == Operand::kBfloat16 && w.is_scaled_by_value());
    run.chunks_per_group = w.num_groups > 1 && !is_scaled ? w.group / run.chunk : run.end_chunk;
    run.factor = 1.0f;
    run.lines = w.panel(panel);
    run.weight = &w;
    run.panel = panel;
    if (w.scale != nullptr && !is_scaled) {
        run.scale = advance(w.scale, w.scale_dtype, panel * w.num_groups * w.scale_lanes);
        run.scale_dtype = w.scale_dtype;
        run.scale_lanes = w.scale_lanes;
        run.factor = format.scale_factor * w.factor / w.divisor;
        if (operand == Operand::kInt8) run.factor *= w.table_unit;
    }
    if (w.offset != nullptr && operand == Operand::kInt8) {
        run.offset = advance(w.offset, w.scale_dtype, panel * w.num_groups * kPanelRows);
        run.offset_kind = w.offset_kind;
    }
    if (w.parts != nullptr) run.parts = w.parts + panel * w.num_pairs() * w.pair_bytes;
    if (w.zero != nullptr) run.zero = w.zero + panel * w.num_groups * kPanelRows;
    return run;
}

}  // namespace
}  // namespace amalgam
