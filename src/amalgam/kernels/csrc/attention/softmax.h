// The online softmax: scores of a tile of keys → weights of its values.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention/memory.h"
#include "attention/microkernel.h"
#include "attention/tile.h"
#include "product/exponential.h"

namespace amalgam {
namespace {

inline void cap_scores(const ItemMemory& memory, float* scores, int64_t count) {
    const float cap = memory.args.softcap, scale = memory.args.scale;
    if (memory.key_factors != nullptr) {
        for (int64_t key = 0; key < count; ++key) scores[key] = soft_cap(scores[key] * memory.key_factors[key], cap);
    } else {
        for (int64_t key = 0; key < count; ++key) scores[key] = soft_cap(scores[key] * scale, cap);
    }
}

// Up to kLanes rows of a softmax. Count: int, or a constant where the number is known when it is compiled.
template <class Count>
struct SoftmaxRows {
    Count count;
    int64_t first;      // among the item's rows
    int64_t blocks;     // of 16 keys, up to the last that any of the rows sees
    int64_t place = 0;  // of the first row in `scores` and `weights`
};

template <int M>
using FixedRows = SoftmaxRows<std::integral_constant<int, M>>;

// Turns scores into weights 2^(score - maximum) and brings each row's maximum and total up to date. factors[m]: what
// the row's earlier output has to be multiplied by.
template <class A, class Count>
inline void softmax(const ItemMemory& memory, const Tile& tile, const SoftmaxRows<Count>& rows, float* factors,
                    Prefetcher& prefetcher) {
    constexpr int64_t kWords = kTileKeys / A::kElements;
    const int64_t local = rows.first % memory.head_rows, keys = rows.blocks * kLanes;
    const float factor = memory.score_factor;
    alignas(64) float old_maximum[kLanes] = {}, new_maximum[kLanes] = {};
    const bool is_capped = memory.args.softcap > 0.0f;
    for (int m = 0; m < rows.count; ++m) {
        const int64_t last = memory.item.first_position + (local + m) / memory.shared - tile.first_key;
        const int64_t first = first_visible(memory.args, last + tile.first_key) - tile.first_key;
        const bool is_whole = first <= 0 && last >= keys - 1;
        float* scores = memory.scores + (rows.place + m) * kTileKeys;
        old_maximum[m] = memory.range_maximum[rows.first + m];
        Floats highest = broadcast(old_maximum[m]);
        if (is_capped) cap_scores(memory, scores, keys);
        for (int64_t key = 0; key < keys; key += kLanes) {
            const bool is_by_key = memory.key_factors != nullptr && !is_capped;
            const Floats scale = is_by_key ? load_floats(memory.key_factors + key) : broadcast(factor);
            Floats score = mul(load_floats(scores + key), scale);
            if (!is_whole) {
                score = keep_range(score, static_cast<int>(std::clamp<int64_t>(first - key, 0, kLanes)),
                                   static_cast<int>(std::clamp<int64_t>(last + 1 - key, 0, kLanes)));
            }
            store_floats(scores + key, score);
            highest = maximum(score, highest);
        }
        const float found = highest_lane(highest);
        memory.range_maximum[rows.first + m] = found;
        new_maximum[m] = found == kNegativeInfinity ? 0.0f : found;  // nothing seen yet
    }
    store_floats(factors, exp2_lanes(subtract(load_floats(old_maximum), load_floats(new_maximum))));
    for (int m = 0; m < rows.count; ++m) {
        const float* scores = memory.scores + (rows.place + m) * kTileKeys;
        float* weights = memory.weights + (rows.place + m) * kWords;
        float* totals = memory.range_total + (rows.first + m) * kLanes;
        const Floats offset = broadcast(new_maximum[m]);
        Floats total = mul(load_floats(totals), broadcast(factors[m]));
        for (int64_t key = 0; key < keys; key += kLanes) {
            Floats weight = exp2_lanes(subtract(load_floats(scores + key), offset));
            const bool is_scaled = memory.value_factors != nullptr;
            const Floats stored = is_scaled ? mul(weight, load_floats(memory.value_factors + key)) : weight;
            if constexpr (A::kElements == 2) {
                const Floats rounded = store_bfloat16(weights + key / 2, stored);
                if (!is_scaled) weight = rounded;
            } else {
                store_floats(weights + key, stored);
            }
            total = add(total, weight);
        }
        store_floats(totals, total);
        // A step of the unit takes two blocks.
        if (A::kUsesUnit && rows.blocks % 2 != 0) std::fill_n(weights + keys / 2, kLanes / 2, 0.0f);
        prefetcher.advance();
    }
}

}  // namespace
}  // namespace amalgam
