// Codes that become bfloat16 four inputs of all rows at a time, for activations in bfloat16.
//
// A format's Quads say how: a step is kStep inputs in kLines lines, and quad<i>(lines) has inputs 4i to 4i + 3 of all
// rows, one to a byte of a lane.
#pragma once

#include <algorithm>
#include <cstring>

#include "formats/group_values.h"
#include "isa/isa.h"
#include "product/each.h"
#include "product/matrix.h"

namespace amalgam {
namespace {

// How a code becomes a value: less a zero point; that, times a scale; or times a scale, and a minimum added.
enum class Values { kUnscaled, kScaled, kWithMinimum };

// One group's factors in registers.
template <Values kValues>
struct QuadFactors {
    Floats scale, zero, minimum;

    explicit QuadFactors(const GroupValues& values)
        : scale(load_floats(values.scale)), zero(load_floats(values.zero)), minimum(load_floats(values.minimum)) {}
    QuadFactors(Floats scale, Floats zero, Floats minimum) : scale(scale), zero(zero), minimum(minimum) {}

    Floats value(const Floats& code) const {
        if constexpr (kValues == Values::kWithMinimum) return add(mul(code, scale), minimum);
        const Floats whole = subtract(code, zero);
        return kValues == Values::kScaled ? mul(whole, scale) : whole;
    }
};

// Inputs [first, ...) of a panel as lines of a bf16 panel, as many whole steps as there are before `end` and the
// weight's end. Returns the input after them.
template <class F, Values kValues>
int64_t expand_quads_as(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
    using Quads = typename F::Quads;
    constexpr bool kLooksUp = F::kIsTable;
    const int64_t shared = F::kPart > 0 ? F::kPart : w.group;
    const bool has_groups = kValues != Values::kUnscaled || w.zero != nullptr;
    const int64_t whole = std::min(end, w.columns) / Quads::kStep * Quads::kStep;
    if (first % Quads::kStep != 0 || first >= whole || (has_groups && shared % 4 != 0)) return first;

    GroupValues values;
    alignas(64) float constant[kPanelRows];
    std::fill_n(constant, kPanelRows, static_cast<float>(F::kZero));
    QuadFactors<kValues> factors(load_floats(constant), load_floats(constant), load_floats(constant));
    [[maybe_unused]] const Table table = load_table(w.looked_up);
    const uint8_t* lines = w.panel(panel) + first / Quads::kStep * Quads::kLines * kLineBytes;
    int64_t next = has_groups ? first : whole;  // where other factors begin
    for (int64_t at = first; at < whole; at += Quads::kStep, lines += Quads::kLines * kLineBytes) {
        each<Quads::kStep / 4>([&](auto quad) {
            if (at + 4 * quad >= next) {
                values.template load<F>(w, panel, (at + 4 * quad) / shared);
                factors = QuadFactors<kValues>(values);
                next = ((at + 4 * quad) / shared + 1) * shared;
            }
            Bytes codes = Quads::template quad<decltype(quad)::value>(lines);
            if constexpr (kLooksUp) codes = look_up(table, codes);
            Floats value[4];
            each<4>([&](auto i) {
                constexpr int kByte = decltype(i)::value;
                if constexpr (kLooksUp) {  // biased as products with int8 want it
                    const Ints code = add(byte_of<kByte, kInt8Bias == 0>(codes), broadcast_int(-kInt8Bias));
                    value[kByte] = mul(to_floats(code), broadcast(w.table_unit));
                    if constexpr (kValues == Values::kScaled) value[kByte] = mul(value[kByte], factors.scale);
                } else {
                    value[kByte] = factors.value(to_floats(byte_of<kByte, false>(codes)));
                }
            });
            each<2>([&](auto half) {
                constexpr int kFirst = 2 * decltype(half)::value;
                constexpr bool kIsExact = kValues == Values::kUnscaled && !kLooksUp;
                store_pairs(out, kIsExact ? join_exact(value[kFirst], value[kFirst + 1])
                                          : join_rounded(value[kFirst], value[kFirst + 1]));
                out += kLineBytes;
            });
        });
    }
    return whole;
}

template <class F>
int64_t expand_quads(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
    if (!F::kHasScale || !w.is_scaled_by_value())
        return expand_quads_as<F, Values::kUnscaled>(w, panel, first, end, out);
    if constexpr (F::kTakesOffset) {
        if (w.offset_kind == Offset::kMinimum) {
            return expand_quads_as<F, Values::kWithMinimum>(w, panel, first, end, out);
        }
    }
    return expand_quads_as<F, Values::kScaled>(w, panel, first, end, out);
}

}  // namespace
}  // namespace amalgam
