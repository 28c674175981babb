// What products with several panels at once (product/wide.h) and matrix units (product/unit.h) read of a format: bytes,
// four inputs to a lane, and the factors of each chunk. The bytes are unsigned codes; signed ones, less their zero
// point, where a format has parts, which units leave to the vectors.
#pragma once

#include <algorithm>

#include "formats/table.h"
#include "product/each.h"
#include "product/tile.h"

namespace amalgam {
namespace {

template <class F>
constexpr bool kHasByteLines =
    F::kOperand == Operand::kInt8 && (kWidePanels > 1 || (MatrixUnit<>::kExists && F::kPart == 0));

// What is subtracted from codes as unsigned bytes. A table's values have kInt8Bias added, as such bytes always 128.
template <class F>
constexpr int kByteZero = F::kIsTable ? 128 : F::kZero;

// Codes as unsigned bytes, which is what lines of int8 are.
template <class F>
const uint8_t* expand_codes(const Run& run, int64_t inputs, uint8_t* out) {
    if constexpr (F::kBits == 8) {
        return run.lines;
    } else {
        using Lines = typename F::Lines;
        const typename F::Loader loader(run);
        const uint8_t* line = run.lines;
        uint8_t* to = out;
        for (int64_t at = 0; at < inputs; at += Lines::kStep, line += Lines::kLines * kLineBytes) {
            each<Lines::kQuads>([&](auto quad) {
                auto codes = loader.template quad<decltype(quad)::value>(line);
                if constexpr (F::kZero != kByteZero<F>) codes = subtract_bytes(codes, F::kZero - kByteZero<F>);
                store_bytes(to + quad() * kLineBytes, codes);
            });
            to += Lines::kQuads * kLineBytes;
        }
        return out;
    }
}

// Codes less F::kZero as signed bytes, whose activations have 128 added, and for each chunk what is too much for that;
// each part's scale less the next one's of the same chunk, for which wide.h has the reason; minima as they are.
template <class F>
void expand_parts(const Run& run, int64_t inputs, const ByteLines& to) {
    using Lines = typename F::Lines;
    constexpr int kQuads = F::kPart / 4, kPairLines = 2 * F::kPart * Lines::kLines / Lines::kStep;
    constexpr int kPairs = kChunk / F::kPart / 2;
    const typename F::Loader loader(run);
    const uint8_t* pair = run.parts + run.first_chunk * kPairs * F::kPairBytes;
    const uint8_t* line = run.lines;
    uint8_t* bytes = to.bytes;
    int32_t (*scale)[kPanelRows] = to.part_scales;
    for (int64_t i = 0; i < inputs / kChunk * kPairs; ++i, pair += F::kPairBytes, scale += 2) {
        Pairs scales, minima;
        F::load_parts(pair, scales, minima);
        store_pairs(reinterpret_cast<uint8_t*>(to.minima[i]), minima);
        store_ints(scale[0], first_scale(scales));
        store_ints(scale[1], second_scale(scales));
        Ints too_much = i % kPairs == 0 ? broadcast_int(0) : load_ints(to.first[i / kPairs]);
        each<2>([&](auto half) {
            auto sum = broadcast_int(0);
            each<kQuads>([&](auto quad) {
                const auto codes = loader.template quad<half() * kQuads + quad()>(line);
                const auto signed_codes = subtract_bytes(codes, F::kZero);
                store_bytes(bytes, signed_codes);
                bytes += kLineBytes;
                sum = add_128_times(sum, signed_codes);
            });
            too_much = add(too_much, times(scaled(sum, load_ints(scale[half()])), -1));
        });
        store_ints(to.first[i / kPairs], too_much);
        line += kPairLines * kLineBytes;
        const auto take_next = [](int32_t* of_part) {
            store_ints(of_part, add(load_ints(of_part), times(load_ints(of_part + kPanelRows), -1)));
        };
        if (i % kPairs != 0) take_next(scale[-1]);
        take_next(scale[0]);
    }
}

// The chunks of a run, at most as many as there is room for.
template <class F>
const uint8_t* expand_bytes(const Run& run, const ByteLines& to) {
    GroupCursor cursor(run);
    GroupFactors factors = load_factors<F>(run, cursor.group);
    for (int64_t local = 0; local < run.end_chunk - run.first_chunk; ++local) {
        store_floats(to.factors[local][0], factors.scale);
        store_floats(to.factors[local][1], factors.offset);
        if (cursor.next() && run.first_chunk + local + 1 < run.end_chunk) factors = load_factors<F>(run, cursor.group);
    }
    const int64_t inputs = std::min(run.end_chunk * run.chunk, run.padded_columns) - run.first_chunk * run.chunk;
    if constexpr (F::kPart > 0) {
        expand_parts<F>(run, inputs, to);
        return to.bytes;
    } else {
        return expand_codes<F>(run, inputs, to.bytes);
    }
}

}  // namespace
}  // namespace amalgam
