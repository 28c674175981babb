// The loop that multiplies lines of codes (formats/codes.h, nested.h, table4.h) with int8 activations.
//
// A few products are summed in a Partial, as many as it holds; partials join an integer sum, in formats with parts
// multiplied by the part's integer scale; a chunk's sum joins the total as in tiles.h. All integers are exact.
#pragma once

#include "formats/table.h"
#include "product/each.h"
#include "product/tile.h"

namespace amalgam {
namespace {

// Quads of inputs whose products with a code fit a Partial.
template <class F>
constexpr int partial_quads() {
    constexpr int64_t kFitting = kLargestPartial / (2 * 127 * F::kLargest);
    return kFitting >= 8 ? 8 : kFitting >= 4 ? 4 : kFitting >= 2 ? 2 : 1;
}

template <int M>
struct Partials {
    Partial row[M];

    Partials() {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) row[m] = zero_partial();
    }
    template <class F>
    void add_quad(const Bytes& w, const TileRows& x, int64_t at) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) row[m] = F::dot(row[m], w, broadcast4(x.values[m] + at));
    }
    void join(Ints* sum) const {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = add_partial(sum[m], row[m]);
    }
    void join(Ints* sum, const PartScale& scale) const {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = add_scaled(sum[m], row[m], scale);
    }
};

// sum += inputs [at, end), whole steps.
template <class F, int M, class Prefetch>
inline void add_plain(const typename F::Loader& loader, const uint8_t* line, const TileRows& x, int64_t at, int64_t end,
                      const Prefetch& prefetcher, Ints* sum) {
    using Lines = typename F::Lines;
    constexpr int kQuads = partial_quads<F>(), kStepBytes = Lines::kLines * kLineBytes;
    // Partials last for several steps, or steps for several partials.
    constexpr int kSteps = kQuads > Lines::kQuads ? kQuads / Lines::kQuads : 1;
    constexpr int kEach = kQuads < Lines::kQuads ? kQuads : Lines::kQuads;
    constexpr int kTogether = kSteps * Lines::kQuads;  // quads
    const auto add = [&](auto count, int64_t from, const uint8_t* lines) {
        constexpr int kCount = decltype(count)::value, kSum = kSteps > 1 ? kCount : kEach;
        each<kCount / kSum>([&](auto part) {
            Partials<M> partials;
            each<kSum>([&](auto quad) {
                constexpr int kQuad = decltype(part)::value * kSum + decltype(quad)::value;
                partials.template add_quad<F>(loader.template quad<kQuad>(lines), x, from + 4 * kQuad);
            });
            partials.join(sum);
        });
    };
    for (; at + 4 * kTogether <= end; at += 4 * kTogether, line += kSteps * kStepBytes) {
        each<kSteps * Lines::kLines>([&](auto i) { prefetcher.at_line(line + i * kLineBytes); });
        add(std::integral_constant<int, kTogether>{}, at, line);
    }
    if constexpr (kSteps > 1) {
        for (; at < end; at += Lines::kStep, line += kStepBytes) {
            add(std::integral_constant<int, Lines::kQuads>{}, at, line);
        }
    }
}

// sum += pairs of parts from `pair` on, each part times its scale; minima += the pairs' minima (or scales, where the
// format has none) times the sums of their activations.
template <class F, int M, class Prefetch>
inline void add_nested(const typename F::Loader& loader, const uint8_t* line, const TileRows& x, int64_t at,
                       int64_t end, const uint8_t* pair, const int16_t* const* part_sums, const Prefetch& prefetcher,
                       Ints* sum, Ints* minima) {
    using Lines = typename F::Lines;
    constexpr int kPartQuads = F::kPart / 4, kQuads = partial_quads<F>() < kPartQuads ? partial_quads<F>() : kPartQuads;
    constexpr int kPairLines = 2 * F::kPart * Lines::kLines / Lines::kStep;
    for (int64_t i = 0; at < end; at += 2 * F::kPart, line += kPairLines * kLineBytes, pair += F::kPairBytes, i += 2) {
        each<kPairLines>([&](auto l) { prefetcher.at_line(line + l * kLineBytes); });
        Pairs scales, least;
        F::load_parts(pair, scales, least);
        each<2>([&](auto half) {
            constexpr int kHalf = decltype(half)::value;
            const PartScale scale = kHalf == 0 ? first_scale(scales) : second_scale(scales);
            each<kPartQuads / kQuads>([&](auto part) {
                Partials<M> partials;
                each<kQuads>([&](auto quad) {
                    constexpr int kQuad = kHalf * kPartQuads + decltype(part)::value * kQuads + decltype(quad)::value;
                    partials.template add_quad<F>(loader.template quad<kQuad>(line), x, at + 4 * kQuad);
                });
                partials.join(sum, scale);
            });
        });
        if constexpr (F::kTakesOffset || F::kZero != 0) {
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) minima[m] = dot_shorts(minima[m], least, broadcast4(part_sums[m] + i));
        }
    }
}

// y [M, 16] += int8 activations times lines of codes.
template <class F, int M, class Prefetch>
void codes_tile(const Run& run, const TileRows& x, float* y) {
    const typename F::Loader loader(run);
    Prefetch prefetcher(run);
    GroupCursor cursor(run);
    GroupFactors factors = load_factors<F>(run, cursor.group);
    Floats total[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) total[m] = load_floats(y + m * kPanelRows);
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk, local = 0; chunk < run.end_chunk; ++chunk, ++local) {
        prefetcher.at_chunk();
        const int64_t inputs = run.inputs(chunk);
        Ints sum[M], minima[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = minima[m] = broadcast_int(0);
        if constexpr (F::kPart > 0) {
            const int16_t* part_sums[M];
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) part_sums[m] = x.part_sums[m] + local * run.chunk / F::kPart;
            const uint8_t* pair = run.parts + chunk * run.chunk / (2 * F::kPart) * F::kPairBytes;
            add_nested<F, M>(loader, line, x, at, at + inputs, pair, part_sums, prefetcher, sum, minima);
        } else {
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) sum[m] = zeros_times<F>(run, cursor.group, -x.sum[m][local]);
            add_plain<F, M>(loader, line, x, at, at + inputs, prefetcher, sum);
        }
        at += inputs;
        line += inputs * F::kBytesPerInput;
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            if constexpr (F::kPart > 0 && !F::kTakesOffset && F::kZero != 0) {
                sum[m] = add(sum[m], times(minima[m], -F::kZero));
            }
            const Floats scale = mul(factors.scale, broadcast_float(x.scale[m] + local));
            total[m] = add(total[m], mul(to_floats(sum[m]), scale));
            if constexpr (F::kPart > 0 && F::kTakesOffset) {
                const Floats least = mul(factors.offset, broadcast_float(x.scale[m] + local));
                total[m] = subtract(total[m], mul(to_floats(minima[m]), least));
            } else if (F::kTakesOffset && run.offset != nullptr) {
                total[m] = add(total[m],
                               mul(factors.offset, broadcast(x.scale[m][local] * static_cast<float>(x.sum[m][local]))));
            }
        }
        if (cursor.next() && chunk + 1 < run.end_chunk) factors = load_factors<F>(run, cursor.group);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) store_floats(y + m * kPanelRows, total[m]);
}

}  // namespace
}  // namespace amalgam
