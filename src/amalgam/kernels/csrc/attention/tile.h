// A tile of keys as the rows of an item see it: where in the cache it lies, and how it is read and fetched.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/memory.h"
#include "attention/microkernel.h"
#include "runtime/prefetcher.h"

namespace amalgam {
namespace {

struct Tile {
    int64_t first_key;
    int64_t num_blocks;        // of 16 keys, up to the last that any row sees
    int64_t slots[kTileKeys];  // -1: not seen by any row; it may not exist
    bool is_run[kTileBlocks];  // whether a block's keys stand one after the other
};

inline void locate(const AttentionItem& item, int64_t first_key, Tile& tile) {
    tile.first_key = first_key;
    const int64_t end = std::min<int64_t>(item.end_key - first_key, kTileKeys);
    tile.num_blocks = (end + kLanes - 1) / kLanes;
    int64_t block = first_key / item.block_size, offset = first_key % item.block_size;
    for (int64_t key = 0; key < kTileKeys; ++key) {
        const bool is_seen = key < end && first_key + key >= item.first_key;
        tile.slots[key] = is_seen ? item.block_ids[block] * item.block_size + offset : -1;
        if (++offset == item.block_size) {
            offset = 0;
            ++block;
        }
    }
    for (int i = 0; i < kTileBlocks; ++i) {
        const int64_t* slots = tile.slots + i * kLanes;
        tile.is_run[i] = slots[0] >= 0;
        for (int key = 1; key < kLanes; ++key) tile.is_run[i] &= slots[key] == slots[0] + key;
    }
}

// Keys or values of one slot; of one that no row sees, zeros.
template <class T>
inline const T* at_slot(const ItemMemory& memory, const CacheView& cache, int64_t slot, int64_t head) {
    if (slot < 0) return reinterpret_cast<const T*>(memory.zeros);
    return static_cast<const T*>(cache.data) + slot * cache.slot_stride +
           (memory.item.first_kv_head + head) * cache.head_stride;
}

// function(T{}) for the type of a cache's elements.
template <class A, class Function>
inline void with_element(DType dtype, Function&& function) {
    if constexpr (A::kElements == 1) {  // pairs are made of nothing wider than they are
        if (dtype == DType::kFloat32) return function(float{});
        if (dtype == DType::kFloat16) return function(Float16{});
    }
    if (dtype == DType::kInt8) return function(Int8Code{});
    if (dtype == DType::kFp8) return function(Fp8Code{});
    function(Bfloat16{});
}

inline Prefetcher::Source source(const CacheView& cache, const AttentionItem& item) {
    const int64_t bytes = dtype_bytes(cache.dtype);
    return {static_cast<const uint8_t*>(cache.data) + item.first_kv_head * cache.head_stride * bytes,
            cache.slot_stride * bytes, ((item.num_kv_heads - 1) * cache.head_stride + cache.dim) * bytes};
}

// The keys and values of a tile, in as many calls of advance().
inline Prefetcher fetch(const AttentionArgs& args, const AttentionItem& item, const Tile& tile, int64_t num_advances) {
    return Prefetcher(tile.slots, tile.num_blocks * kLanes, source(args.keys, item), source(args.values, item),
                      num_advances);
}

}  // namespace
}  // namespace amalgam
