// Attention of one item: packs each tile of keys and values once, runs the item's rows over it.
//
// Both products are one microkernel, rows of 32-bit operands times lines of 16 lanes. An operand and a lane hold two
// bfloat16 where query, keys and values are bfloat16 (then the softmax weights are rounded to bfloat16, and their total
// is that of the rounded ones), and one float otherwise. Products of pairs on a matrix unit
// are in unit.h.
//
// Codes are multiplied as they are: the scale of a key multiplies its score, and that of a value the weight that it is
// multiplied with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <utility>

#include "attention/direct.h"
#include "attention/memory.h"
#include "attention/merging.h"
#include "attention/microkernel.h"
#include "attention/packing.h"
#include "attention/softmax.h"
#include "attention/tile.h"
#include "attention/unit.h"

namespace amalgam {
namespace {

template <class A>
class Attention {
 public:
    Attention(const AttentionArgs& args, const AttentionItem& item, float* scratch)
        : args_(args),
          item_(item),
          memory_(args, item, scratch, A::kElements, A::kUsesUnit),
          reads_directly_(reads_directly<A>(memory_)) {}

    int64_t scratch_floats() const { return memory_.scratch_floats; }

    void attend(const AttentionItem* following, bool is_first) {
        std::fill_n(memory_.zeros, std::max(args_.keys.dim, args_.values.dim) + kLanes, 0.0f);
        if (is_first) fetch_start();
        gather_query();
        const TakenUnit<A::kUsesUnit> unit(memory_.unit_rows);
        if (item_.partial == nullptr) begin_merge(memory_);
        for (int64_t first = item_.first_key; first < item_.end_key;) {
            const int64_t end = std::min(first / kRangeKeys * kRangeKeys + kRangeKeys, item_.end_key);
            attend_range(first, end, following);
            if (item_.partial == nullptr) {
                merge_range(memory_);
            } else {
                store_partial(memory_);
            }
            first = end;
        }
        if (item_.partial == nullptr) write_output(memory_);
    }

    void merge(int64_t num_ranges, int64_t stride) {
        begin_merge(memory_);
        for (int64_t range = 0; range < num_ranges; ++range) merge_partial(memory_, item_.partial + range * stride);
        write_output(memory_);
    }

    // See AttentionKernels::score.
    void score(const float* weights, float* out, int64_t stride) {
        std::fill_n(memory_.zeros, args_.keys.dim + kLanes, 0.0f);
        gather_query();
        const TakenUnit<A::kUsesUnit> unit(memory_.unit_rows);
        Tile tile;
        Prefetcher prefetcher;
        for (int64_t first = item_.first_key; first < item_.end_key; first += kTileKeys) {
            locate(item_, first, tile);
            if (memory_.key_factors != nullptr) {
                gather_factors<A>(memory_, args_.keys, tile, 0, 1.0f, memory_.key_factors);
            }
            pack_tile_keys(tile, 0, prefetcher);
            if constexpr (A::kUsesUnit) {
                for (int64_t row = 0; row < memory_.rows; row += memory_.rows_at_once) {
                    const int64_t count = std::min(memory_.rows_at_once, memory_.rows - row);
                    score_on_unit(row, count, tile.num_blocks, prefetcher);
                    add_scores(tile, row, count, weights, out + first, stride);
                }
            } else {
                for (int64_t row = 0; row < memory_.rows; row += kTileRows) {
                    score_rows<kTileRows>(tile, row, memory_.rows - row, weights, out + first, stride);
                }
            }
        }
    }

 private:
    void gather_query() {
        for (int64_t row = 0; row < memory_.rows; ++row) {
            const int64_t at =
                memory_.token_of(row) * args_.query_token_stride + memory_.head_of(row) * args_.query_head_stride;
            float* words = memory_.query_of(row);
            std::fill(words + memory_.key_steps - 1, words + memory_.query_stride, 0.0f);
            if constexpr (A::kElements == 2) {
                std::memcpy(words, static_cast<const Bfloat16*>(args_.query) + at,
                            static_cast<size_t>(args_.keys.dim) * sizeof(Bfloat16));
            } else {
                widen_all(advance(args_.query, args_.query_dtype, at), args_.query_dtype, args_.keys.dim, words);
            }
        }
    }

    // --- A range of keys ---

    void attend_range(int64_t first_key, int64_t end_key, const AttentionItem* following) {
        std::fill_n(memory_.range_maximum, memory_.rows, kNegativeInfinity);
        std::fill_n(memory_.range_total, memory_.rows * kLanes, 0.0f);
        std::fill_n(memory_.range_output, item_.num_kv_heads * memory_.head_places * memory_.value_dim, 0.0f);
        Tile tiles[2];
        Tile *tile = &tiles[0], *next = &tiles[1];
        locate(item_, first_key / kTileKeys * kTileKeys, *tile);
        for (;;) {
            const int64_t next_key = tile->first_key + kTileKeys;
            Prefetcher prefetcher;
            if (next_key < item_.end_key) {  // perhaps in the next range
                locate(item_, next_key, *next);
                prefetcher = fetch(args_, item_, *next, num_advances());
            } else if (following != nullptr) {
                locate(*following, following->first_key / kTileKeys * kTileKeys, *next);
                prefetcher = fetch(args_, *following, *next, num_advances());
            }
            for (int64_t head = 0; head < item_.num_kv_heads; ++head) attend_tile(*tile, head, prefetcher);
            if (next_key >= end_key) return;
            std::swap(tile, next);
        }
    }

    // How often computing a tile comes by a prefetcher, about.
    int64_t num_advances() const {
        const int64_t rows = memory_.head_rows;
        if constexpr (A::kUsesUnit) {
            const int64_t packing = kTileBlocks * unit_steps(memory_.key_steps) + kTileKeys / A::kElements;
            const int64_t products = kTileBlocks / 2 + memory_.value_dim / (2 * kLanes);
            const int64_t rounds = (rows + memory_.rows_at_once - 1) / memory_.rows_at_once;
            return item_.num_kv_heads * (packing + rows + rounds * products);
        }
        if (!reads_directly_) return item_.num_kv_heads * 2 * (kTileBlocks + rows);
        const int64_t values = kTileKeys / 8 * memory_.value_dim / (rows <= 4 ? 4 : 2) / kLanes;
        return item_.num_kv_heads * (kTileBlocks * memory_.key_steps / 4 + rows + values);
    }

    void fetch_start() const {
        Tile tile;
        locate(item_, item_.first_key / kTileKeys * kTileKeys, tile);
        fetch(args_, item_, tile, 1).advance();
    }

    // --- One tile of keys, one KV head ---

    void attend_tile(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        if (args_.keys.scales != nullptr) {
            const float factor = args_.softcap > 0.0f ? args_.scale : memory_.score_factor;
            gather_factors<A>(memory_, args_.keys, tile, head, factor, memory_.key_factors);
        }
        if (args_.values.scales != nullptr) {
            gather_factors<A>(memory_, args_.values, tile, head, 1.0f, memory_.value_factors);
        }
        if constexpr (kFusesPacking && !A::kUsesUnit) {
            if (reads_directly_) {
                return with_element<A>(args_.keys.dtype, [&](auto element) {
                    using T = decltype(element);
                    if constexpr (kIsDirect<A, T>) attend_directly<T, kTileRows>(tile, head, prefetcher);
                });
            }
        }
        pack_tile_keys(tile, head, prefetcher);
        with_element<A>(args_.values.dtype,
                        [&](auto element) { pack_values<A, decltype(element)>(memory_, tile, head, prefetcher); });
        if constexpr (A::kUsesUnit) return attend_on_unit(tile, head, prefetcher);
        const int64_t first = head * memory_.head_rows, end = first + memory_.head_rows;
        int64_t row = first;
        for (; row + kTileRows <= end; row += kTileRows) attend_rows<kTileRows>(tile, row, row - first, prefetcher);
        if (row < end) attend_rest<kTileRows - 1>(tile, row, row - first, end - row, prefetcher);
    }

    void pack_tile_keys(const Tile& tile, int64_t head, Prefetcher& prefetcher) const {
        with_element<A>(args_.keys.dtype,
                        [&](auto element) { pack_keys<A, decltype(element)>(memory_, tile, head, prefetcher); });
    }

    template <int M>
    void attend_rest(const Tile& tile, int64_t row, int64_t local, int64_t count, Prefetcher& prefetcher) {
        if constexpr (M > 1) {
            if (count < M) return attend_rest<M - 1>(tile, row, local, count, prefetcher);
        }
        attend_rows<M>(tile, row, local, prefetcher);
    }

    template <int M>
    void attend_rows(const Tile& tile, int64_t row, int64_t local, Prefetcher& prefetcher) {
        const int64_t blocks = visible_blocks(tile, local + M - 1);
        if (blocks == 0) return;
        multiply_blocks<A, M>(scores_of(row), blocks, prefetcher);
        alignas(64) float factors[kLanes];
        softmax<A>(memory_, tile, FixedRows<M>{{}, row, blocks}, factors, prefetcher);
        multiply_blocks<A, M>({{memory_.weights, kTileKeys / A::kElements},
                               {memory_.values, memory_.value_dim},
                               {memory_.output_of(row), memory_.value_dim},
                               blocks * kLanes / A::kElements,
                               factors},
                              memory_.value_dim / kLanes, prefetcher);
    }

    RowProduct scores_of(int64_t first_row) const {
        return {{memory_.query_of(first_row), memory_.query_stride},
                {memory_.keys, kTileKeys},
                {memory_.scores, kTileKeys},
                memory_.key_steps};
    }

    // The rows of one KV head on the matrix unit.
    void attend_on_unit(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        const int64_t value_dim = memory_.value_dim, end = memory_.head_rows;
        for (int64_t local = 0; local < end; local += memory_.rows_at_once) {
            const int64_t count = std::min(memory_.rows_at_once, end - local), row = head * end + local;
            const int64_t blocks = visible_blocks(tile, local + count - 1);
            if (blocks == 0) continue;
            score_on_unit(row, count, blocks, prefetcher);
            alignas(64) float factors[2 * kUnitRows];
            for (int64_t at = 0; at < count; at += kLanes) {
                const int rows = static_cast<int>(std::min<int64_t>(kLanes, count - at));
                softmax<A>(memory_, tile, SoftmaxRows<int>{rows, row + at, blocks, at}, factors + at, prefetcher);
            }
            float* output = memory_.output_of(row);
            scale_rows(output, value_dim, factors, count);
            multiply_on_unit<MatrixUnit<>, true>({{memory_.weights, kTileKeys / A::kElements},
                                                  {memory_.values, value_dim},
                                                  {output, value_dim},
                                                  unit_steps(blocks * kLanes / A::kElements),
                                                  memory_.unit_rows},
                                                 count, value_dim / kLanes, prefetcher);
        }
    }

    void score_on_unit(int64_t row, int64_t count, int64_t blocks, Prefetcher& prefetcher) {
        multiply_on_unit<MatrixUnit<>, false>({{memory_.query_of(row), memory_.query_stride},
                                               {memory_.keys, kTileKeys},
                                               {memory_.scores, kTileKeys},
                                               unit_steps(memory_.key_steps),
                                               memory_.unit_rows},
                                              count, blocks, prefetcher);
    }

    // Few rows: the same products straight from the cache.
    template <class T, int M>
    void attend_directly(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        if constexpr (M > 1) {
            if (memory_.head_rows < M) return attend_directly<T, M - 1>(tile, head, prefetcher);
        }
        const int64_t blocks = visible_blocks(tile, M - 1), row = head * memory_.head_rows;
        if (blocks == 0) return;
        score_directly<A, T, M>(memory_, tile, blocks, head, row, prefetcher);
        alignas(64) float factors[kLanes];
        softmax<A>(memory_, tile, FixedRows<M>{{}, row, blocks}, factors, prefetcher);
        add_values_directly<A, T, M>(memory_, tile, blocks, head, factors, prefetcher);
    }

    // Blocks of the tile that the rows of a KV head up to this one see; later rows see more, at most all.
    int64_t visible_blocks(const Tile& tile, int64_t last_row) const {
        const int64_t last_position = item_.first_position + last_row / memory_.shared;
        if (last_position < tile.first_key) return 0;
        return std::min(tile.num_blocks, (last_position - tile.first_key + kLanes) / kLanes);
    }

    // --- An indexer's scores ---

    template <int M>
    void score_rows(const Tile& tile, int64_t row, int64_t count, const float* weights, float* out, int64_t stride) {
        if constexpr (M > 1) {
            if (count < M) return score_rows<M - 1>(tile, row, count, weights, out, stride);
        }
        Prefetcher prefetcher;
        multiply_blocks<A, M>(scores_of(row), tile.num_blocks, prefetcher);
        add_scores(tile, row, M, weights, out, stride);
    }

    // The scores of these rows join their tokens' sums.
    void add_scores(const Tile& tile, int64_t row, int64_t count, const float* weights, float* out, int64_t stride) {
        for (int64_t m = 0; m < count; ++m) {
            const int64_t token = item_.first_token + (row + m) / memory_.shared, head = (row + m) % memory_.shared;
            const Floats weight = broadcast(weights[token * args_.heads + head]);
            float* sums = out + token * stride;
            for (int64_t key = 0; key < tile.num_blocks * kLanes; key += kLanes) {
                Floats score = load_floats(memory_.scores + m * kTileKeys + key);
                if (memory_.key_factors != nullptr) score = mul(score, load_floats(memory_.key_factors + key));
                const Floats sum = head == 0 ? zero_floats() : load_floats(sums + key);
                store_floats(sums + key, fused(weight, maximum(zero_floats(), score), sum));
            }
        }
    }

    const AttentionArgs& args_;
    const AttentionItem& item_;
    ItemMemory memory_;
    bool reads_directly_;
};

inline bool works_in_pairs(const AttentionArgs& args) {
    const auto is_narrow = [](DType dtype) { return dtype == DType::kBfloat16 || is_code(dtype); };
    return args.query_dtype == DType::kBfloat16 && is_narrow(args.keys.dtype) && is_narrow(args.values.dtype);
}

int64_t attention_scratch(const AttentionArgs& args, const AttentionItem& item) {
    return works_in_pairs(args) ? Attention<PairArithmetic>(args, item, nullptr).scratch_floats()
                                : Attention<FloatArithmetic>(args, item, nullptr).scratch_floats();
}

void attend(const AttentionArgs& args, const AttentionItem& item, const AttentionItem* next, bool is_first,
            float* scratch) {
    if (works_in_pairs(args)) {
        Attention<PairArithmetic>(args, item, scratch).attend(next, is_first);
    } else {
        Attention<FloatArithmetic>(args, item, scratch).attend(next, is_first);
    }
}

void score(const AttentionArgs& args, const AttentionItem& item, const float* weights, float* out, int64_t stride,
           float* scratch) {
    if (works_in_pairs(args)) {
        Attention<PairArithmetic>(args, item, scratch).score(weights, out, stride);
    } else {
        Attention<FloatArithmetic>(args, item, scratch).score(weights, out, stride);
    }
}

void merge_attention(const AttentionArgs& args, const AttentionItem& item, int64_t num_ranges, int64_t stride,
                     float* scratch) {
    if (works_in_pairs(args)) {
        Attention<PairArithmetic>(args, item, scratch).merge(num_ranges, stride);
    } else {
        Attention<FloatArithmetic>(args, item, scratch).merge(num_ranges, stride);
    }
}

}  // namespace
}  // namespace amalgam
