// A tile: up to kMaxTileRows rows of activations times a run of chunks of one panel. What every tile function is given,
// and the seam at which an instruction set brings one of its own.
#pragma once

#include "isa/isa.h"
#include "product/matrix.h"

namespace amalgam {

constexpr int kMaxTileRows = 16;

// What translation units of one instruction set share.
inline namespace AMALGAM_ISA {

// Chunks [first_chunk, end_chunk) of a panel.
struct Run {
    const uint8_t* lines;  // at the first chunk
    int64_t first_chunk;
    int64_t end_chunk;
    int64_t chunk;             // inputs
    int64_t chunks_per_group;  // at least all of them: one group
    int64_t padded_columns;
    const void* scale;  // at the panel's first group, or null
    DType scale_dtype;
    int scale_lanes;
    const uint8_t* zero;  // at the panel's first group, or null
    const void* offset;   // at the panel's first group, or null; of scale_dtype
    Offset offset_kind;
    const uint8_t* parts;  // at the panel's first pair, or null
    const uint8_t* ahead;  // what to prefetch while these lines are computed; null: the lines themselves
    int64_t ahead_lines;   // how much of it
    const Matrix* weight;
    int64_t panel;
    float factor;  // multiplies every scale; a power of two

    int64_t inputs(int64_t index) const {
        const int64_t left = padded_columns - index * chunk;
        return left < chunk ? left : chunk;
    }
};

// Rows of activations, each at the first input of the run; chunk scales and sums at the first chunk.
struct TileRows {
    const uint8_t* values[kMaxTileRows];
    const float* scale[kMaxTileRows];
    const int32_t* sum[kMaxTileRows];
    const int16_t* part_sums[kMaxTileRows];
};

// y [rows, 16] += rows times run.
using TileFunction = void (*)(const Run&, const TileRows&, float* y);

}  // namespace AMALGAM_ISA

namespace {

// Of one group, times the run's factor.
inline Floats load_scale(const Run& run, int64_t group) {
    if (run.scale_lanes == 1) {
        float value;
        widen_all(advance(run.scale, run.scale_dtype, group), run.scale_dtype, 1, &value);
        value *= run.factor;
        return broadcast_float(&value);
    }
    const Floats scale = load_scales(advance(run.scale, run.scale_dtype, group * kPanelRows), run.scale_dtype);
    return mul(scale, broadcast_float(&run.factor));
}

// What a group's sums are multiplied by: those of products, and those of activations where there is an offset.
struct GroupFactors {
    Floats scale, offset;
};

// Sums of products are of codes less F::kZero; of formats with parts, of codes as they are, and their offset is the
// minimum.
template <class F>
inline GroupFactors load_factors(const Run& run, int64_t group) {
    GroupFactors factors{load_scale(run, group), zero_floats()};
    if (!F::kTakesOffset || run.offset == nullptr) return factors;
    factors.offset = load_scales(advance(run.offset, run.scale_dtype, group * kPanelRows), run.scale_dtype);
    if constexpr (F::kPart == 0) {
        const float zero = F::kZero;
        if (run.offset_kind == Offset::kZero) {
            factors.offset = mul(subtract(broadcast(zero), factors.offset), factors.scale);
        } else {
            factors.offset = add(factors.offset, mul(factors.scale, broadcast(zero)));
        }
    }
    return factors;
}

// factor times the zero points, or times F::kZero where the weight has none.
template <class F>
inline Ints zeros_times(const Run& run, int64_t group, int32_t factor) {
    return F::kTakesZero && run.zero != nullptr ? zero_times(run.zero + group * kPanelRows, factor)
                                                : broadcast_int(factor * F::kZero);
}

// Follows the group that a chunk is in, without a division per chunk.
struct GroupCursor {
    int64_t group, left, chunks_per_group;

    explicit GroupCursor(const Run& run)
        : group(run.first_chunk / run.chunks_per_group),
          left(run.chunks_per_group - run.first_chunk % run.chunks_per_group),
          chunks_per_group(run.chunks_per_group) {}

    // To the next chunk; whether it is in another group.
    bool next() {
        if (--left > 0) return false;
        left = chunks_per_group;
        ++group;
        return true;
    }
};

// The seam for tile functions of an instruction set's own, for M rows and lines of format F, and the most rows of a
// tile of F. Null and 0 are the vector loops of tiles.h, with up to kTileRows rows; the header of an instruction set
// specialises both where it has something better, behind its primitives (docs/extending.md has an example). A row must
// get the same bits for every M, those left to the vector loops included, and for every cut of its chunks into runs.
template <class F, int M>
constexpr TileFunction kOwnTile = nullptr;
template <class F>
constexpr int kOwnTileRows = 0;

// The seam for matrix units, which have tiles in registers of their own. The header of an instruction set that has one
// specialises this, behind its primitives: amx.h, and amx_emulated.h, which says in plain C++ what each function does.
// unit.h multiplies with it: bfloat16 operands always, int8 operands, but of formats with parts, of as many rows as
// pay.
template <class = void>
struct MatrixUnit {
    static constexpr bool kExists = false;
    static constexpr int kPanels = 1;  // of a weight that are multiplied at once
};

}  // namespace
}  // namespace amalgam
