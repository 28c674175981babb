// What a matrix unit multiplies of a weight: pieces of its panels, as lines of bytes or pairs.
#pragma once

#include <algorithm>
#include <cstring>

#include "product/format_kernels.h"
#include "product/unit_rows.h"

namespace amalgam {
namespace {

constexpr int64_t kStepBytes = kPanelRows * kLineBytes;  // of a panel
constexpr int64_t kMaxPieceSteps = 8;        // whose lines, of two panels, are in the first-level cache together
constexpr int64_t kFewRowsAhead = 8 * 1024;  // bytes of a panel that are prefetched where nothing else takes time

// Lines that are prefetched while steps are computed: with each, as many as one reads.
struct PrefetchCursor {
    const uint8_t* next;
    int64_t left;

    void at_step() {
        const int64_t count = std::min<int64_t>(left, kPanelRows);
        for (int64_t i = 0; i < count; ++i, next += kLineBytes) prefetch_far(next);
        left -= count;
    }
};

// What a pair of tiles prefetches while it is multiplied by bytes [begin, end) of a panel: its share of what comes
// next; with few rows, which take less time than memory, what comes some way on.
inline PrefetchCursor prefetch_cursor(const Matrix& w, int64_t panel, int64_t begin, int64_t end, int64_t num_tiles,
                                      int64_t pair) {
    const int64_t sharers = std::min<int64_t>((num_tiles + 1) / 2, kMaxSharers);
    const int64_t lines = (end - begin + kLineBytes - 1) / kLineBytes, share = (lines + sharers - 1) / sharers;
    if (pair >= sharers) return {};
    const int64_t at = num_tiles == 1 ? begin + kFewRowsAhead : end, left = at - w.panel_bytes();
    const uint8_t* from = left < 0 ? w.panel(panel) + at : w.panel(panel + MatrixUnit<>::kPanels) + left;
    return {from + pair * share * kLineBytes, share};
}

using Factors = float[2][kPanelRows];  // of a chunk: its group's scale and offset

// Chunks [first, end) of one or two panels.
struct Piece {
    int64_t first, end;
    Run run[2];
    const uint8_t* lines[2];
    alignas(kLineBytes) Factors factors[2][kMaxPieceSteps];
    PrefetchCursor cursor[2];
};

// make(chunk, where its lines go) for each chunk of a run, where chunks are filled up with zeros to whole steps.
template <class Make>
inline void for_padded_chunks(const Steps& steps, const Run& run, uint8_t* out, Make&& make) {
    const int64_t num_steps = steps.first_step(run.end_chunk) - steps.first_step(run.first_chunk);
    std::memset(out, 0, static_cast<size_t>(num_steps * kStepBytes));
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk, out += steps.per_chunk * kStepBytes) {
        make(chunk, out);
    }
}

// The lines of a piece's panel as unsigned bytes, as they lie or expanded in `out`; factors: of its chunks.
inline const uint8_t* byte_lines(const Matrix& w, const Steps& steps, const Run& run, uint8_t* out, Factors* factors) {
    const auto widen = kernels_of(w.format).expand_bytes;
    if (!steps.is_padded) return widen(run, {out, factors});
    Run one = run;
    for_padded_chunks(steps, run, out, [&](int64_t chunk, uint8_t* to) {
        one.first_chunk = chunk;
        one.end_chunk = chunk + 1;
        const int64_t inputs = one.inputs(chunk);
        const uint8_t* bytes = widen(one, {to, factors++});
        if (bytes != to) std::memcpy(to, bytes, static_cast<size_t>(inputs * kPanelRows));
        one.lines += inputs * w.bytes_per_input;
    });
    return out;
}

// The same as lines of a bf16 panel. Of the factors only scales, where there are groups.
inline const uint8_t* pair_lines(const Matrix& w, const Steps& steps, const Run& run, uint8_t* out, Factors* factors) {
    const bool is_bf16 = w.format == kFormat<Bf16>;
    if (run.scale != nullptr && w.num_groups > 1) {
        for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk, ++factors) {
            store_floats((*factors)[0], load_scale(run, chunk / run.chunks_per_group));
        }
    }
    const auto make = [&](int64_t first_chunk, int64_t end_chunk, uint8_t* to) {
        const int64_t first = steps.first_input(first_chunk), end = steps.first_input(end_chunk);
        if (is_bf16) {
            std::memcpy(to, w.panel(run.panel) + first * Bf16::kBytesPerInput,
                        static_cast<size_t>((end - first) * Bf16::kBytesPerInput));
        } else {
            kernels_of(w.format).expand_pairs(w, run.panel, first, end, to);
        }
    };
    if (!steps.is_padded) {
        if (is_bf16) return run.lines;
        make(run.first_chunk, run.end_chunk, out);
        return out;
    }
    for_padded_chunks(steps, run, out, [&](int64_t chunk, uint8_t* to) { make(chunk, chunk + 1, to); });
    return out;
}

// Pairs of a whole number of steps, each lane times its scale.
inline void scale_pairs(const float* scale, int64_t num_steps, uint8_t* lines) {
    for (const uint8_t* end = lines + num_steps * kStepBytes; lines < end; lines += kLineBytes) {
        uint32_t line[kPanelRows];
        std::memcpy(line, lines, sizeof line);
        for (int lane = 0; lane < kPanelRows; ++lane) {
            const float first = as_float(line[lane] << 16), second = as_float(line[lane] & 0xffff0000);
            line[lane] = bfloat16_bits(first * scale[lane]) | uint32_t{bfloat16_bits(second * scale[lane])} << 16;
        }
        std::memcpy(lines, line, sizeof line);
    }
}

}  // namespace
}  // namespace amalgam
