// A tile of keys and values → what the microkernel multiplies. A step is the 32 bits of an operand:
//
//     keys    [steps][4 blocks][16 keys]       a step is 2 or 1 dimensions
//     values  [steps][blocks][16 dimensions]   a step is 2 or 1 keys
//
// Sixteen steps of a block are a tile of the matrix unit as they lie; what is left of the last ones is zeros. With few
// rows the unit waits for what is packed here, so that the next tile is fetched in smaller pieces meanwhile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention/memory.h"
#include "attention/microkernel.h"
#include "attention/tile.h"
#include "isa/isa.h"
#include "runtime/prefetcher.h"

namespace amalgam {
namespace {

// What the codes of a tile's keys or values are to be multiplied with.
template <class A>
inline void gather_factors(const ItemMemory& memory, const CacheView& cache, const Tile& tile, int64_t head,
                           float factor, float* factors) {
    if (A::kElements == 2 && cache.dtype == DType::kFp8) factor *= 256.0f;  // see expand_codes
    const float* scales = cache.scales + memory.item.first_kv_head + head;
    for (int key = 0; key < kTileKeys; ++key) {
        const int64_t slot = tile.slots[key];
        factors[key] = slot < 0 ? 0.0f : scales[slot * memory.args.kv_heads] * factor;
    }
}

// `padded` elements, zeros behind the first `count`.
template <class T, class Element>
inline void copy_row(const T* from, int64_t count, Element* to, int64_t padded) {
    if constexpr (std::is_same_v<T, Element>) {
        std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
    } else if constexpr (std::is_same_v<Element, float>) {
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
    } else {
        const int64_t whole = count / kLanes * kLanes;
        expand_codes(from, whole, to);
        if (whole < count) {
            T rest[kLanes] = {};
            Bfloat16 expanded[kLanes];
            std::copy_n(from + whole, count - whole, rest);
            expand_codes(rest, kLanes, expanded);
            std::copy_n(expanded, count - whole, to + whole);
        }
    }
    std::memset(static_cast<void*>(to + count), 0, static_cast<size_t>(padded - count) * sizeof(Element));
}

template <class A, class T>
inline void pack_keys(const ItemMemory& memory, const Tile& tile, int64_t head, Prefetcher& prefetcher) {
    using Element = typename A::Element;
    constexpr int64_t kDims = kLanes * A::kElements;  // of one transposition
    const CacheView& cache = memory.args.keys;
    alignas(64) Element copied[kLanes][kDims];
    const float* from[kLanes];
    for (int64_t block = 0; block < tile.num_blocks; ++block) {
        const T* key[kLanes];
        for (int i = 0; i < kLanes; ++i) key[i] = at_slot<T>(memory, cache, tile.slots[block * kLanes + i], head);
        for (int64_t dim = 0; dim < cache.dim; dim += kDims) {
            const int64_t count = std::min(kDims, cache.dim - dim);
            const bool is_direct = std::is_same_v<T, Element> && count == kDims;
            for (int i = 0; i < kLanes; ++i) {
                if (!is_direct) copy_row(key[i] + dim, count, copied[i], kDims);
                from[i] = reinterpret_cast<const float*>(is_direct ? static_cast<const void*>(key[i] + dim)
                                                                   : static_cast<const void*>(copied[i]));
            }
            transpose(from, memory.keys + dim / A::kElements * kTileKeys + block * kLanes, kTileKeys);
            if (A::kUsesUnit) prefetcher.advance();
        }
        if (!A::kUsesUnit) prefetcher.advance();
    }
}

inline void interleave(const Bfloat16* a, const Bfloat16* b, int64_t count, float* line) {
    interleave_pairs(&a->bits, &b->bits, count, line);
}

template <class A, class T>
inline void pack_values(const ItemMemory& memory, const Tile& tile, int64_t head, Prefetcher& prefetcher) {
    const CacheView& cache = memory.args.values;
    const int64_t dims = cache.dim, whole = dims / kLanes * kLanes, padded = memory.value_dim;
    float* line = memory.values;
    for (int64_t key = 0; key < tile.num_blocks * kLanes; key += A::kElements) {
        const T* first = at_slot<T>(memory, cache, tile.slots[key], head);
        if constexpr (A::kElements == 2 && !std::is_same_v<T, Bfloat16>) {
            auto* rows = reinterpret_cast<Bfloat16*>(memory.expanded);
            copy_row(first, dims, rows, padded);
            copy_row(at_slot<T>(memory, cache, tile.slots[key + 1], head), dims, rows + padded, padded);
            interleave(rows, rows + padded, padded, line);
        } else if constexpr (A::kElements == 2) {
            const T* second = at_slot<T>(memory, cache, tile.slots[key + 1], head);
            interleave(first, second, whole, line);
            if (whole < dims) {
                Bfloat16 copied[2][kLanes];
                copy_row(first + whole, dims - whole, copied[0], kLanes);
                copy_row(second + whole, dims - whole, copied[1], kLanes);
                interleave(copied[0], copied[1], kLanes, line + whole);
            }
        } else {
            copy_row(first, dims, line, padded);
        }
        line += padded;
        if (A::kUsesUnit || key % kLanes == 0) prefetcher.advance();
    }
    // A step of the unit takes two blocks.
    if (A::kUsesUnit && tile.num_blocks % 2 != 0) std::fill_n(line, kLanes / A::kElements * padded, 0.0f);
}

}  // namespace
}  // namespace amalgam
