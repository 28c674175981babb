// Products of rows of activations with the panels of a weight.
//
// Few rows: each panel is read once, front to back, with all sums in registers. More rows than a tile: a piece of the
// panel that fits the first-level cache serves one tile after the other, expanded once if its format needs it; sums
// are kept in a small buffer. Many rows of int8, with registers enough: several panels at once (wide.h). All add up in
// the same order.
#pragma once

#include <algorithm>
#include <cmath>

#include "product/elementwise.h"
#include "product/format_kernels.h"
#include "product/sums.h"
#include "product/unit.h"
#include "product/wide.h"

namespace amalgam {
namespace {

constexpr int64_t kPieceBytes = 16 * 1024;  // of a panel in the first-level cache, as the inner loop reads it
constexpr int kPanelsAtOnce = std::max(MatrixUnit<>::kPanels, kWidePanels);

// Which lines the tile functions read, and whether they have to be made first.
struct Access {
    const FormatKernels& lines;
    bool expands;
};

inline Access access_of(const Matrix& w, const FormatKernels& format, Operand operand, int64_t rows) {
    const bool is_direct = operand != Operand::kBfloat16 || !w.is_scaled_by_value();
    if (operand == format.operand && rows <= format.direct_rows && is_direct) return {format, false};
    return {kernels_of(operand == Operand::kFloat32 ? kFormat<Fp32> : kFormat<Bf16>), true};
}

inline TileRows tile_rows(const Activations& x, int64_t first_row, int64_t rows, int64_t num_chunks, int64_t chunk,
                          int64_t inputs_per_chunk) {
    TileRows tile;
    for (int64_t m = 0; m < rows; ++m) {
        const int64_t row = x.row(first_row + m);
        const int64_t at = (row * x.stride + chunk * inputs_per_chunk) * operand_bytes(x.kind);
        tile.values[m] = static_cast<const uint8_t*>(x.values) + at;
        if (x.kind == Operand::kInt8) {
            tile.scale[m] = x.scale + row * num_chunks + chunk;
            tile.sum[m] = x.sum + row * num_chunks + chunk;
            if (x.part > 0) tile.part_sums[m] = x.part_sums + (row * x.padded_columns + chunk * x.chunk) / x.part;
        }
    }
    return tile;
}

// sums.row[r] = x[first_row + r] · panel, for at most kMaxRows rows, but for what the format leaves to add_exceptions.
void panel_product(const Matrix& w, const Activations& x, int64_t first_row, int64_t rows, int64_t panel, Sums& sums) {
    alignas(64) uint8_t piece[kPieceBytes];
    const FormatKernels& format = kernels_of(w.format);
    const Access access = access_of(w, format, x.kind, rows);
    const int64_t line_bytes_per_input = access.lines.bytes_per_input, bytes_per_input = w.bytes_per_input;
    Run run = whole_panel(w, format, x.kind, panel);
    const int64_t num_chunks = run.end_chunk;
    int64_t step = num_chunks;
    const int64_t tile_size = access.lines.tile_rows;
    if (rows > tile_size || access.expands) {
        step = std::max<int64_t>(1, kPieceBytes / (run.chunk * line_bytes_per_input));
    }
    const int64_t num_tiles = rows <= tile_size ? 1 : (rows + tile_size - 1) / tile_size;
    std::memset(sums.row, 0, sizeof(float) * kPanelRows * static_cast<size_t>(rows));
    for (int64_t chunk = 0; chunk < num_chunks; chunk += step) {
        run.first_chunk = chunk;
        run.end_chunk = std::min(chunk + step, num_chunks);
        const int64_t first = chunk * run.chunk, end = std::min(run.end_chunk * run.chunk, run.padded_columns);
        if (access.expands) {
            if (x.kind == Operand::kFloat32) {
                format.expand_floats(w, panel, first, end, reinterpret_cast<float*>(piece));
            } else {
                format.expand_pairs(w, panel, first, end, piece);
            }
            run.lines = piece;
        } else {
            run.lines = w.panel(panel) + first * line_bytes_per_input;
        }
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t begin = rows * tile / num_tiles, count = rows * (tile + 1) / num_tiles - begin;
            if (num_tiles > 1 || access.expands) {
                // The first tiles share the prefetch of the next piece: none waits for memory while others only
                // compute.
                const int64_t lines = (end - first) * bytes_per_input / kLineBytes;
                const int64_t sharers = std::min(num_tiles, kMaxSharers), share = (lines + sharers - 1) / sharers;
                run.ahead = w.panel(panel) + end * bytes_per_input + tile * share * kLineBytes;
                run.ahead_lines = tile < sharers ? share : 0;
            }
            const TileRows values = tile_rows(x, first_row + begin, count, num_chunks, chunk, run.chunk);
            access.lines.tiles[count - 1](run, values, sums.row[begin]);
        }
    }
}

void expand(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
    kernels_of(w.format).expand_floats(w, panel, first, end, out);
}

// How many rows of the weight the panel really has.
inline int panel_width(const Matrix& w, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanelRows, w.rows - panel * kPanelRows));
}

inline void add_bias(const Bias& bias, int64_t panel, int width, int64_t rows, Sums& sums) {
    if (bias.data == nullptr) return;
    float wide[kPanelRows] = {};
    widen_all(advance(bias.data, bias.dtype, panel * kPanelRows), bias.dtype, width, wide);
    for (int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kPanelRows; ++lane) sums.row[row][lane] += wide[lane];
    }
}

// All lanes. GCC vectorises this only if it has not unrolled it before, and knows that lanes and results lie apart.
template <class Out>
inline void write_lanes(const float* __restrict lanes, Out* __restrict out) {
#pragma GCC unroll 1
    for (int lane = 0; lane < kPanelRows; ++lane) narrow(lanes[lane], out + lane);
}

template <class Out>
void write_panel(const Sums& sums, int64_t rows, int width, Out* out, int64_t stride) {
    for (int64_t row = 0; row < rows; ++row, out += stride) {
        if (width == kPanelRows) {
            write_lanes(sums.row[row], out);
        } else {
            for (int lane = 0; lane < width; ++lane) narrow(sums.row[row][lane], out + lane);
        }
    }
}

int64_t panels_at_once(const ProductArgs& args) {
    const Operand kind = args.x.kind;
    if constexpr (MatrixUnit<>::kPanels > 1) return kind == Operand::kFloat32 ? 1 : MatrixUnit<>::kPanels;
    return kind == Operand::kInt8 ? WideBlock<>::panels_of(*args.weight) : 1;
}

// Calls function(first row, rows, panel, sums) for stretches of at most kMaxRows rows with each panel, sums complete.
template <class Function>
inline void for_products(const ProductArgs& args, int64_t first_row, int64_t end_row, int64_t first_panel,
                         int64_t end_panel, Function&& function) {
    const Matrix& w = *args.weight;
    const FormatKernels& format = kernels_of(w.format);
    const bool has_exceptions = format.add_exceptions != nullptr && args.x.kind == format.operand;
    Sums sums[kPanelsAtOnce];
    for (int64_t row = first_row; row < end_row; row += kMaxRows) {
        const int64_t rows = std::min<int64_t>(kMaxRows, end_row - row);
        const UnitBlock<MatrixUnit<>> unit(w, args.x, row, rows);
        const WideBlock<> wide(w, args.x, row, rows, !unit.is_used());
        const int at_once = unit.is_used() ? MatrixUnit<>::kPanels : wide.panels();
        for (int64_t panel = first_panel; panel < end_panel; panel += at_once) {
            const int count = static_cast<int>(std::min<int64_t>(at_once, end_panel - panel));
            const bool is_wide = !unit.is_used() && count == at_once && at_once > 1;
            if (unit.is_used()) unit.multiply(panel, count, sums);
            if (is_wide) wide.multiply(panel, sums);
            for (int i = 0; i < count; ++i) {
                if (!unit.is_used() && !is_wide) panel_product(w, args.x, row, rows, panel + i, sums[i]);
                if (has_exceptions) format.add_exceptions(w, panel + i, args.x, row, rows, sums[i].row);
                add_bias(args.bias, panel + i, panel_width(w, panel + i), rows, sums[i]);
                function(row, rows, panel + i, sums[i]);
            }
        }
    }
}

void product(const ProductArgs& args, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
    for_products(args, first_row, end_row, first_panel, end_panel,
                 [&](int64_t row, int64_t rows, int64_t panel, const Sums& sums) {
                     const int width = panel_width(*args.weight, panel);
                     void* out = advance(args.out, args.out_dtype, row * args.out_stride + panel * kPanelRows);
                     if (args.out_dtype == DType::kFloat32) {
                         write_panel(sums, rows, width, static_cast<float*>(out), args.out_stride);
                     } else {
                         write_panel(sums, rows, width, static_cast<Bfloat16*>(out), args.out_stride);
                     }
                 });
}

template <bool kIsGelu, class Row>
void join_lanes(const Gating& gating, int width, const Row& up, float* out) {
    for (int lane = 0; lane < width; ++lane) out[lane] = join<kIsGelu>(gating, out[lane], up[lane]);
}

// All gate panels first: a weight is then read as one long stream. Their sums wait in the result's place.
void gate_up(const GateUpArgs& args, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
    product(args.gate, first_row, end_row, first_panel, end_panel);
    const Gating gating = args.gating;
    const int64_t stride = args.gate.out_stride;
    for_products(args.up, first_row, end_row, first_panel, end_panel,
                 [&](int64_t row, int64_t rows, int64_t panel, const Sums& up) {
                     const int width = panel_width(*args.up.weight, panel);
                     float* out = static_cast<float*>(args.gate.out) + row * stride + panel * kPanelRows;
                     for (int64_t i = 0; i < rows; ++i, out += stride) {
                         if (gating.is_gelu) {
                             join_lanes<true>(gating, width, up.row[i], out);
                         } else {
                             join_lanes<false>(gating, width, up.row[i], out);
                         }
                     }
                 });
}

}  // namespace
}  // namespace amalgam
