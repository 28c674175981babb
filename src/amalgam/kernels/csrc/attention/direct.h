// Both products for few rows, straight from the cache: without packed tiles that are stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/memory.h"
#include "attention/microkernel.h"
#include "attention/tile.h"
#include "isa/isa.h"
#include "runtime/prefetcher.h"

namespace amalgam {
namespace {

// Whether rows of a cache of T are read like this.
template <class A, class T>
constexpr bool kIsDirect = std::is_same_v<T, typename A::Element> || (A::kElements == 2 && sizeof(T) == 1);

// Whether these keys and values are. The matrix unit multiplies tiles that are stored.
template <class A>
inline bool reads_directly(const ItemMemory& memory) {
    const CacheView &keys = memory.args.keys, &values = memory.args.values;
    constexpr DType kDType = A::kElements == 2 ? DType::kBfloat16 : DType::kFloat32;
    const bool is_direct_type = keys.dtype == kDType || (A::kElements == 2 && is_code(keys.dtype));
    return !A::kUsesUnit && memory.head_rows <= kTileRows && keys.dtype == values.dtype && is_direct_type &&
           keys.dim % (kLanes * A::kElements) == 0 && values.dim % (2 * kLanes) == 0;
}

// Calls function(at), where at(i) is where dimensions [first, first + count) of the block's i-th row begin: in the
// cache, or expanded.
template <class A, class T, class Function>
AMALGAM_INLINE void with_rows(const ItemMemory& memory, const CacheView& cache, const Tile& tile, int64_t block,
                              int64_t head, int64_t first, int64_t count, Function&& function) {
    using Element = typename A::Element;
    const int64_t* slots = tile.slots + block * kLanes;
    if constexpr (!std::is_same_v<T, Element>) {
        auto* rows = reinterpret_cast<Element*>(memory.expanded);
        for (int i = 0; i < kLanes; ++i) {
            expand_codes(at_slot<T>(memory, cache, slots[i], head) + first, count, rows + i * count);
        }
        function([=](int i) { return rows + i * count; });
    } else if (tile.is_run[block]) {
        const T* row = at_slot<T>(memory, cache, slots[0], head) + first;
        const int64_t stride = cache.slot_stride;
        function([=](int i) { return row + i * stride; });
    } else {
        const T* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) rows[i] = at_slot<T>(memory, cache, slots[i], head) + first;
        function([&](int i) { return rows[i]; });
    }
}

// Scores of M rows and 16 keys. Each transposed line is used at once.
template <class A, int M, class Key>
AMALGAM_INLINE void score_block(const ItemMemory& memory, Key key, int64_t row, float* scores, Prefetcher& prefetcher) {
    Floats sum[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sum[m] = zero_floats();
    const int64_t stride = memory.query_stride, steps = memory.key_steps;
    const float* query = memory.query_of(row);
    for (int64_t step = 0; step < steps; step += 4) {
        typename A::Line line[4];
        transpose_four([&](int i) { return reinterpret_cast<const float*>(key(i)) + step; }, line);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                sum[m] = A::multiply_add(sum[m], line[i], A::word(query + m * stride + step + i));
            }
        }
        prefetcher.advance();
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store_floats(scores + m * kTileKeys, sum[m]);
}

// The scores of M rows and the tile's first `blocks` blocks of keys.
template <class A, class T, int M>
inline void score_directly(const ItemMemory& memory, const Tile& tile, int64_t blocks, int64_t head, int64_t row,
                           Prefetcher& prefetcher) {
    const CacheView& keys = memory.args.keys;
    for (int64_t block = 0; block < blocks; ++block) {
        with_rows<A, T>(memory, keys, tile, block, head, 0, keys.dim, [&](auto key) {
            score_block<A, M>(memory, key, row, memory.scores + block * kLanes, prefetcher);
        });
    }
}

// The values of one step, key and perhaps the next one.
template <class A, int N, class Value>
AMALGAM_INLINE void load_values(Value value, int key, typename A::Line* line) {
    if constexpr (A::kElements == 2) {
#pragma GCC unroll 2
        for (int n = 0; n < N; n += 2) {
            interleave_two(&value(key)[n * kLanes].bits, &value(key + 1)[n * kLanes].bits, line + n);
        }
    } else {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) line[n] = load_floats(value(key) + n * kLanes);
    }
}

// output [M rows, N * 16 dimensions] = output * factors + weights × values.
template <class A, class T, int M, int N>
inline void add_columns(const ItemMemory& memory, const Tile& tile, int64_t blocks, int64_t head, int64_t dim,
                        const float* factors, Prefetcher& prefetcher) {
    const int64_t stride = memory.value_dim;
    float* output = memory.output_of(head * memory.head_rows) + dim;
    Floats sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        const Floats factor = broadcast_float(factors + m);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = mul(load_floats(output + m * stride + n * kLanes), factor);
    }
    const float* weights = memory.weights;
    for (int64_t block = 0; block < blocks; ++block) {
        with_rows<A, T>(memory, memory.args.values, tile, block, head, dim, N * kLanes,
                        [&](auto value) AMALGAM_INLINE_LAMBDA {
                            for (int key = 0; key < kLanes; key += A::kElements, ++weights) {
                                typename A::Line line[N];
                                load_values<A, N>(value, key, line);
#pragma GCC unroll 8
                                for (int m = 0; m < M; ++m) {
                                    const typename A::Word word = A::word(weights + m * (kTileKeys / A::kElements));
#pragma GCC unroll 4
                                    for (int n = 0; n < N; ++n) sum[m][n] = A::multiply_add(sum[m][n], line[n], word);
                                }
                                if (key % 8 == 0) prefetcher.advance();
                            }
                        });
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) store_floats(output + m * stride + n * kLanes, sum[m][n]);
    }
}

// The same for all dimensions.
template <class A, class T, int M>
inline void add_values_directly(const ItemMemory& memory, const Tile& tile, int64_t blocks, int64_t head,
                                const float* factors, Prefetcher& prefetcher) {
    constexpr int kBlocks = M <= 4 ? 4 : 2;
    const int64_t end = memory.args.values.dim;
    int64_t dim = 0;
    for (; dim + kBlocks * kLanes <= end; dim += kBlocks * kLanes) {
        add_columns<A, T, M, kBlocks>(memory, tile, blocks, head, dim, factors, prefetcher);
    }
    for (; dim < end; dim += 2 * kLanes) {
        add_columns<A, T, M, 2>(memory, tile, blocks, head, dim, factors, prefetcher);
    }
}

}  // namespace
}  // namespace amalgam
