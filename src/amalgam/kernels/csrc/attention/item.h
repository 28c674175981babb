// Attention of one item: packs each tile of keys and values once, runs the item's rows over it.
//
// Both products are one microkernel, rows of 32-bit operands times lines of 16 lanes. An operand and a lane hold two
// bfloat16 where query, keys and values are bfloat16 (then the softmax weights are rounded to bfloat16, and their total
// is that of the rounded ones), and one float otherwise. Packed tiles:
//
//     keys    [steps][4 blocks][16 keys]       a step is the operand's 2 or 1 dimensions
//     values  [steps][blocks][16 dimensions]   a step is the operand's 2 or 1 keys
//
// Codes are multiplied as they are: the scale of a key multiplies its score, and that of a value the weight that it is
// multiplied with.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <type_traits>

#include "attention/microkernel.h"
#include "product/exponential.h"

namespace amalgam {
namespace {

// A tile of keys as seen by the rows of an item.
struct Tile {
    int64_t first_key;
    int64_t num_blocks;        // of 16 keys, up to the last that any row sees
    int64_t slots[kTileKeys];  // -1: not seen by any row; it may not exist
    bool is_run[kTileBlocks];  // whether a block's keys stand one after the other
};

template <class A>
class Attention {
 public:
    Attention(const AttentionArgs& args, const AttentionItem& item, float* scratch) : args_(args), item_(item) {
        shared_ = args.heads / args.kv_heads;
        head_rows_ = item.num_positions * shared_;
        rows_ = item_rows(args, item);
        key_steps_ = (args.keys.dim + A::kElements - 1) / A::kElements;
        query_stride_ = round_up(key_steps_, kLanes);
        value_dim_ = padded_value_dim(args);
        factor_ = (args.softcap > 0.0f ? 1.0f : args.scale) * kLog2E;
        constexpr DType kDType = A::kElements == 2 ? DType::kBfloat16 : DType::kFloat32;
        const bool is_direct_type = args.keys.dtype == kDType || (A::kElements == 2 && is_code(args.keys.dtype));
        reads_directly_ = head_rows_ <= kTileRows && args.keys.dtype == args.values.dtype && is_direct_type &&
                          args.keys.dim % (kLanes * A::kElements) == 0 && args.values.dim % (2 * kLanes) == 0;
        float* at = scratch;
        const auto take = [&](int64_t count) {
            float* piece = at;
            at += round_up(count, kLanes);
            return piece;
        };
        query_ = take(rows_ * query_stride_);
        keys_ = take(query_stride_ * kTileKeys);
        values_ = take(kTileKeys / A::kElements * value_dim_);
        scores_ = take(kTileRows * kTileKeys);
        weights_ = take(kTileRows * kTileKeys);
        zeros_ = take(std::max(args.keys.dim, args.values.dim) + kLanes);
        if (args.keys.scales != nullptr) key_factors_ = take(kTileKeys);
        if (args.values.scales != nullptr) value_factors_ = take(kTileKeys);
        expanded_ = take(std::max({kLanes * query_stride_, value_dim_, int64_t{kLanes} * 4 * kLanes}));
        maximum_ = take(rows_);
        total_ = take(rows_ * kLanes);
        output_ = take(rows_ * value_dim_);
        merged_maximum_ = take(rows_);
        merged_total_ = take(rows_);
        merged_output_ = take(rows_ * value_dim_);
        scratch_floats_ = at - scratch;
    }

    int64_t scratch_floats() const { return scratch_floats_; }

    void attend(const AttentionItem* following, bool is_first) {
        std::fill_n(zeros_, std::max(args_.keys.dim, args_.values.dim) + kLanes, 0.0f);
        if (is_first) fetch_start();
        gather_query();
        if (item_.partial == nullptr) begin_merge();
        for (int64_t first = item_.first_key; first < item_.end_key;) {
            const int64_t end = std::min(first / kRangeKeys * kRangeKeys + kRangeKeys, item_.end_key);
            attend_range(first, end, following);
            if (item_.partial == nullptr) {
                for (int64_t row = 0; row < rows_; ++row) {
                    merge_row(row, maximum_[row], sum_lanes(total_ + row * kLanes), output_ + row * value_dim_);
                }
            } else {
                store_partial();
            }
            first = end;
        }
        if (item_.partial == nullptr) write_output();
    }

    void merge(int64_t num_ranges, int64_t stride) {
        begin_merge();
        for (int64_t range = 0; range < num_ranges; ++range) {
            const float* maximum = item_.partial + range * stride;
            const float* total = maximum + rows_;
            const float* output = total + rows_;
            for (int64_t row = 0; row < rows_; ++row) {
                merge_row(row, maximum[row], total[row], output + row * value_dim_);
            }
        }
        write_output();
    }

    // See AttentionKernels::score.
    void score(const float* weights, float* out, int64_t stride) {
        std::fill_n(zeros_, args_.keys.dim + kLanes, 0.0f);
        gather_query();
        Tile tile;
        Prefetcher prefetcher;
        for (int64_t first = item_.first_key; first < item_.end_key; first += kTileKeys) {
            locate(item_, first, tile);
            if (key_factors_ != nullptr) gather_factors(args_.keys, tile, 0, 1.0f, key_factors_);
            with_element(args_.keys.dtype, [&](auto element) { pack_keys<decltype(element)>(tile, 0, prefetcher); });
            for (int64_t row = 0; row < rows_; row += kTileRows) {
                score_rows<kTileRows>(tile, row, rows_ - row, weights, out + first, stride);
            }
        }
    }

 private:
    using Element = typename A::Element;

    // --- Rows: [kv head, position, shared head] ---

    void gather_query() {
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t head = item_.first_kv_head * shared_ + row / head_rows_ * shared_ + row % shared_;
            const int64_t token = item_.first_token + row % head_rows_ / shared_;
            const int64_t at = token * args_.query_token_stride + head * args_.query_head_stride;
            float* words = query_ + row * query_stride_;
            words[key_steps_ - 1] = 0.0f;
            if constexpr (A::kElements == 2) {
                std::memcpy(words, static_cast<const Bfloat16*>(args_.query) + at,
                            static_cast<size_t>(args_.keys.dim) * sizeof(Bfloat16));
            } else {
                widen_all(advance(args_.query, args_.query_dtype, at), args_.query_dtype, args_.keys.dim, words);
            }
        }
    }

    void write_output() {
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t head = item_.first_kv_head * shared_ + row / head_rows_ * shared_ + row % shared_;
            const int64_t token = item_.first_token + row % head_rows_ / shared_;
            const int64_t at = (token * args_.heads + head) * args_.values.dim;
            if (args_.query_dtype == DType::kFloat32) {
                write_row(row, static_cast<float*>(args_.out) + at);
            } else {
                write_row(row, static_cast<Bfloat16*>(args_.out) + at);
            }
        }
    }

    template <class T>
    void write_row(int64_t row, T* out) const {
        const float* output = merged_output_ + row * value_dim_;
        const float total = merged_total_[row];
        for (int64_t i = 0; i < args_.values.dim; ++i) narrow(output[i] / total, out + i);
    }

    // --- Ranges of keys ---

    // A sink takes part in the softmax with a weight of 1 and no value.
    void begin_merge() {
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t head = item_.first_kv_head * shared_ + row / head_rows_ * shared_ + row % shared_;
            merged_maximum_[row] = args_.sinks != nullptr ? args_.sinks[head] * kLog2E : kNegativeInfinity;
            merged_total_[row] = args_.sinks != nullptr ? 1.0f : 0.0f;
        }
        std::fill_n(merged_output_, rows_ * value_dim_, 0.0f);
    }

    void merge_row(int64_t row, float maximum, float total, const float* output) {
        if (maximum == kNegativeInfinity && total == 0.0f) return;  // the row sees none of these keys
        const float highest = std::max(merged_maximum_[row], maximum);
        const float factor = exp2_scalar(merged_maximum_[row] - highest), joining = exp2_scalar(maximum - highest);
        merged_maximum_[row] = highest;
        merged_total_[row] = merged_total_[row] * factor + total * joining;
        float* merged = merged_output_ + row * value_dim_;
        for (int64_t i = 0; i < value_dim_; ++i) merged[i] = merged[i] * factor + output[i] * joining;
    }

    void store_partial() {
        std::copy_n(maximum_, rows_, item_.partial);
        for (int64_t row = 0; row < rows_; ++row) item_.partial[rows_ + row] = sum_lanes(total_ + row * kLanes);
        std::copy_n(output_, rows_ * value_dim_, item_.partial + 2 * rows_);
    }

    void attend_range(int64_t first_key, int64_t end_key, const AttentionItem* following) {
        std::fill_n(maximum_, rows_, kNegativeInfinity);
        std::fill_n(total_, rows_ * kLanes, 0.0f);
        std::fill_n(output_, rows_ * value_dim_, 0.0f);
        Tile tiles[2];
        Tile *tile = &tiles[0], *next = &tiles[1];
        locate(item_, first_key / kTileKeys * kTileKeys, *tile);
        for (;;) {
            const int64_t next_key = tile->first_key + kTileKeys;
            Prefetcher prefetcher;
            if (next_key < item_.end_key) {  // perhaps in the next range
                locate(item_, next_key, *next);
                prefetcher = fetch(item_, *next, num_stops());
            } else if (following != nullptr) {
                locate(*following, following->first_key / kTileKeys * kTileKeys, *next);
                prefetcher = fetch(*following, *next, num_stops());
            }
            for (int64_t head = 0; head < item_.num_kv_heads; ++head) attend_tile(*tile, head, prefetcher);
            if (next_key >= end_key) return;
            std::swap(tile, next);
        }
    }

    // How often computing a tile comes by a prefetcher, about.
    int64_t num_stops() const {
        if (!reads_directly_) return item_.num_kv_heads * 2 * (kTileBlocks + head_rows_);
        const int64_t values = kTileKeys / 8 * value_dim_ / (head_rows_ <= 4 ? 4 : 2) / kLanes;
        return item_.num_kv_heads * (kTileBlocks * key_steps_ / 4 + head_rows_ + values);
    }

    Prefetcher fetch(const AttentionItem& item, const Tile& tile, int64_t num_stops) const {
        return Prefetcher(tile.slots, tile.num_blocks * kLanes, source(args_.keys, item), source(args_.values, item),
                          num_stops);
    }

    static Prefetcher::Source source(const CacheView& cache, const AttentionItem& item) {
        const int64_t bytes = dtype_bytes(cache.dtype);
        return {static_cast<const uint8_t*>(cache.data) + item.first_kv_head * cache.head_stride * bytes,
                cache.slot_stride * bytes, ((item.num_kv_heads - 1) * cache.head_stride + cache.dim) * bytes};
    }

    void fetch_start() const {
        Tile tile;
        locate(item_, item_.first_key / kTileKeys * kTileKeys, tile);
        fetch(item_, tile, 1).stop();
    }

    static void locate(const AttentionItem& item, int64_t first_key, Tile& tile) {
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

    // --- One tile of keys, one KV head ---

    void attend_tile(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        if (args_.keys.scales != nullptr) {
            gather_factors(args_.keys, tile, head, args_.softcap > 0.0f ? args_.scale : factor_, key_factors_);
        }
        if (args_.values.scales != nullptr) gather_factors(args_.values, tile, head, 1.0f, value_factors_);
        if constexpr (kFusesPacking) {
            if (reads_directly_) {
                return with_element(args_.keys.dtype, [&](auto element) {
                    using T = decltype(element);
                    if constexpr (kIsDirect<T>) attend_directly<T, kTileRows>(tile, head, prefetcher);
                });
            }
        }
        with_element(args_.keys.dtype, [&](auto element) { pack_keys<decltype(element)>(tile, head, prefetcher); });
        with_element(args_.values.dtype, [&](auto element) { pack_values<decltype(element)>(tile, head, prefetcher); });
        const int64_t first = head * head_rows_, end = first + head_rows_;
        int64_t row = first;
        for (; row + kTileRows <= end; row += kTileRows) attend_rows<kTileRows>(tile, row, row - first, prefetcher);
        if (row < end) attend_rest<kTileRows - 1>(tile, row, row - first, end - row, prefetcher);
    }

    // function(T{}) for the type of a cache's elements.
    template <class Function>
    static void with_element(DType dtype, Function&& function) {
        if constexpr (A::kElements == 1) {  // pairs are made of nothing wider than they are
            if (dtype == DType::kFloat32) return function(float{});
            if (dtype == DType::kFloat16) return function(Float16{});
        }
        if (dtype == DType::kInt8) return function(Int8Code{});
        if (dtype == DType::kFp8) return function(Fp8Code{});
        function(Bfloat16{});
    }

    // What the codes of a tile's keys or values are to be multiplied with.
    void gather_factors(const CacheView& cache, const Tile& tile, int64_t head, float factor, float* factors) const {
        if (A::kElements == 2 && cache.dtype == DType::kFp8) factor *= 256.0f;  // see expand_codes
        const float* scales = cache.scales + item_.first_kv_head + head;
        for (int key = 0; key < kTileKeys; ++key) {
            const int64_t slot = tile.slots[key];
            factors[key] = slot < 0 ? 0.0f : scales[slot * args_.kv_heads] * factor;
        }
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
        // Later rows of the group see more; what none of them sees is left out.
        const int64_t last_position = item_.first_position + (local + M - 1) / shared_;
        const int64_t blocks =
            std::min(tile.num_blocks, (last_position - tile.first_key + kLanes) / kLanes);  // at most all are visible
        if (last_position < tile.first_key) return;
        multiply_blocks<A, M>(query_ + row * query_stride_, query_stride_, keys_, kTileKeys, key_steps_, scores_,
                              kTileKeys, nullptr, blocks, prefetcher);
        alignas(64) float factors[kLanes];
        softmax<M>(tile, row, local, blocks, factors, prefetcher);
        multiply_blocks<A, M>(weights_, kTileKeys / A::kElements, values_, value_dim_, blocks * kLanes / A::kElements,
                              output_ + row * value_dim_, value_dim_, factors, value_dim_ / kLanes, prefetcher);
    }

    // Scores of M rows → weights. `factors`: what the rows' older results are to be multiplied with.
    template <int M>
    void softmax(const Tile& tile, int64_t row, int64_t local, int64_t blocks, float* factors, Prefetcher& prefetcher) {
        static_assert(M <= kLanes);
        alignas(64) float old_maximum[kLanes] = {}, new_maximum[kLanes] = {};
        const Floats factor = broadcast(factor_);
        const bool is_capped = args_.softcap > 0.0f;
        for (int m = 0; m < M; ++m) {
            const int64_t last = item_.first_position + (local + m) / shared_ - tile.first_key;
            const int64_t first = first_visible(args_, last + tile.first_key) - tile.first_key;
            const bool is_whole = first <= 0 && last >= blocks * kLanes - 1;
            float* scores = scores_ + m * kTileKeys;
            old_maximum[m] = maximum_[row + m];
            Floats highest = broadcast(old_maximum[m]);
            if (is_capped) cap_scores(scores, blocks * kLanes);
            for (int64_t key = 0; key < blocks * kLanes; key += kLanes) {
                const bool is_by_key = key_factors_ != nullptr && !is_capped;
                const Floats scale = is_by_key ? load_floats(key_factors_ + key) : factor;
                Floats score = mul(load_floats(scores + key), scale);
                if (!is_whole) {
                    score = keep_range(score, static_cast<int>(std::clamp<int64_t>(first - key, 0, kLanes)),
                                       static_cast<int>(std::clamp<int64_t>(last + 1 - key, 0, kLanes)));
                }
                store_floats(scores + key, score);
                highest = maximum(score, highest);
            }
            maximum_[row + m] = highest_lane(highest);
            new_maximum[m] = maximum_[row + m] == kNegativeInfinity ? 0.0f : maximum_[row + m];  // nothing seen yet
        }
        store_floats(factors, exp2_lanes(subtract(load_floats(old_maximum), load_floats(new_maximum))));
        for (int m = 0; m < M; ++m) {
            const float* scores = scores_ + m * kTileKeys;
            float* weights = weights_ + m * (kTileKeys / A::kElements);
            float* totals = total_ + (row + m) * kLanes;
            const Floats offset = broadcast(new_maximum[m]);
            Floats total = mul(load_floats(totals), broadcast(factors[m]));
            for (int64_t key = 0; key < blocks * kLanes; key += kLanes) {
                Floats weight = exp2_lanes(subtract(load_floats(scores + key), offset));
                const bool is_scaled = value_factors_ != nullptr;
                const Floats stored = is_scaled ? mul(weight, load_floats(value_factors_ + key)) : weight;
                if constexpr (A::kElements == 2) {
                    const Floats rounded = store_bfloat16(weights + key / 2, stored);
                    if (!is_scaled) weight = rounded;
                } else {
                    store_floats(weights + key, stored);
                }
                total = add(total, weight);
            }
            store_floats(totals, total);
            prefetcher.stop();
        }
    }

    void cap_scores(float* scores, int64_t count) const {
        const float cap = args_.softcap, scale = args_.scale;
        if (key_factors_ != nullptr) {
            for (int64_t key = 0; key < count; ++key) scores[key] = soft_cap(scores[key] * key_factors_[key], cap);
        } else {
            for (int64_t key = 0; key < count; ++key) scores[key] = soft_cap(scores[key] * scale, cap);
        }
    }

    // --- Few rows: the same products straight from the cache, without storing packed tiles ---

    template <class T>
    static constexpr bool kIsDirect = std::is_same_v<T, Element> || (A::kElements == 2 && sizeof(T) == 1);

    template <class T, int M>
    void attend_directly(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        if constexpr (M > 1) {
            if (head_rows_ < M) return attend_directly<T, M - 1>(tile, head, prefetcher);
        }
        const int64_t row = head * head_rows_;
        const int64_t last_position = item_.first_position + (M - 1) / shared_;
        if (last_position < tile.first_key) return;
        const int64_t blocks = std::min(tile.num_blocks, (last_position - tile.first_key + kLanes) / kLanes);
        for (int64_t block = 0; block < blocks; ++block) {
            with_rows<T>(args_.keys, tile, block, head, 0, args_.keys.dim,
                         [&](auto key) { score_keys<M>(key, row, scores_ + block * kLanes, prefetcher); });
        }
        alignas(64) float factors[kLanes];
        softmax<M>(tile, row, 0, blocks, factors, prefetcher);
        constexpr int kBlocks = M <= 4 ? 4 : 2;
        int64_t dim = 0;
        for (; dim + kBlocks * kLanes <= args_.values.dim; dim += kBlocks * kLanes) {
            add_values<T, M, kBlocks>(tile, blocks, head, dim, factors, prefetcher);
        }
        for (; dim < args_.values.dim; dim += 2 * kLanes)
            add_values<T, M, 2>(tile, blocks, head, dim, factors, prefetcher);
    }

    // Calls function(at), where at(i) is where dimensions [first, first + count) of the block's i-th row begin: in the
    // cache, or expanded.
    template <class T, class Function>
    AMALGAM_INLINE void with_rows(const CacheView& cache, const Tile& tile, int64_t block, int64_t head, int64_t first,
                                  int64_t count, Function&& function) const {
        const int64_t* slots = tile.slots + block * kLanes;
        if constexpr (!std::is_same_v<T, Element>) {
            auto* rows = reinterpret_cast<Element*>(expanded_);
            for (int i = 0; i < kLanes; ++i) {
                expand_codes(at_slot<T>(cache, slots[i], head) + first, count, rows + i * count);
            }
            function([=](int i) { return rows + i * count; });
        } else if (tile.is_run[block]) {
            const T* row = at_slot<T>(cache, slots[0], head) + first;
            const int64_t stride = cache.slot_stride;
            function([=](int i) { return row + i * stride; });
        } else {
            const T* rows[kLanes];
            for (int i = 0; i < kLanes; ++i) rows[i] = at_slot<T>(cache, slots[i], head) + first;
            function([&](int i) { return rows[i]; });
        }
    }

    // Scores of M rows and 16 keys. Each transposed line is used at once.
    template <int M, class Key>
    AMALGAM_INLINE void score_keys(Key key, int64_t row, float* scores, Prefetcher& prefetcher) {
        Floats sum[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum[m] = zero_floats();
        const float* query = query_ + row * query_stride_;
        for (int64_t step = 0; step < key_steps_; step += 4) {
            typename A::Line line[4];
            transpose_four([&](int i) { return reinterpret_cast<const float*>(key(i)) + step; }, line);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    sum[m] = A::multiply_add(sum[m], line[i], A::word(query + m * query_stride_ + step + i));
                }
            }
            prefetcher.stop();
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) store_floats(scores + m * kTileKeys, sum[m]);
    }

    // The values of one step, key and perhaps the next one.
    template <int N, class Value>
    AMALGAM_INLINE static void load_values(Value value, int key, typename A::Line* line) {
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
    template <class T, int M, int N>
    void add_values(const Tile& tile, int64_t blocks, int64_t head, int64_t dim, const float* factors,
                    Prefetcher& prefetcher) {
        float* output = output_ + head * head_rows_ * value_dim_ + dim;
        Floats sum[M][N];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Floats factor = broadcast_float(factors + m);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = mul(load_floats(output + m * value_dim_ + n * kLanes), factor);
        }
        const float* weights = weights_;
        for (int64_t block = 0; block < blocks; ++block) {
            with_rows<T>(args_.values, tile, block, head, dim, N * kLanes, [&](auto value) AMALGAM_INLINE_LAMBDA {
                for (int key = 0; key < kLanes; key += A::kElements, ++weights) {
                    typename A::Line line[N];
                    load_values<N>(value, key, line);
#pragma GCC unroll 8
                    for (int m = 0; m < M; ++m) {
                        const typename A::Word word = A::word(weights + m * (kTileKeys / A::kElements));
#pragma GCC unroll 4
                        for (int n = 0; n < N; ++n) sum[m][n] = A::multiply_add(sum[m][n], line[n], word);
                    }
                    if (key % 8 == 0) prefetcher.stop();
                }
            });
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) store_floats(output + m * value_dim_ + n * kLanes, sum[m][n]);
        }
    }

    // --- An indexer's scores ---

    template <int M>
    void score_rows(const Tile& tile, int64_t row, int64_t count, const float* weights, float* out, int64_t stride) {
        if constexpr (M > 1) {
            if (count < M) return score_rows<M - 1>(tile, row, count, weights, out, stride);
        }
        Prefetcher prefetcher;
        multiply_blocks<A, M>(query_ + row * query_stride_, query_stride_, keys_, kTileKeys, key_steps_, scores_,
                              kTileKeys, nullptr, tile.num_blocks, prefetcher);
        for (int m = 0; m < M; ++m) {
            const int64_t token = item_.first_token + (row + m) / shared_, head = (row + m) % shared_;
            const Floats weight = broadcast(weights[token * args_.heads + head]);
            float* sums = out + token * stride;
            for (int64_t key = 0; key < tile.num_blocks * kLanes; key += kLanes) {
                Floats score = load_floats(scores_ + m * kTileKeys + key);
                if (key_factors_ != nullptr) score = mul(score, load_floats(key_factors_ + key));
                const Floats sum = head == 0 ? zero_floats() : load_floats(sums + key);
                store_floats(sums + key, fused(weight, maximum(zero_floats(), score), sum));
            }
        }
    }

    // --- Packing ---

    template <class T>
    const T* at_slot(const CacheView& cache, int64_t slot, int64_t head) const {
        if (slot < 0) return reinterpret_cast<const T*>(zeros_);
        return static_cast<const T*>(cache.data) + slot * cache.slot_stride +
               (item_.first_kv_head + head) * cache.head_stride;
    }

    template <class T>
    void pack_keys(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        constexpr int64_t kDims = kLanes * A::kElements;  // of one transposition
        alignas(64) Element copied[kLanes][kDims];
        const float* from[kLanes];
        for (int64_t block = 0; block < tile.num_blocks; ++block) {
            const T* key[kLanes];
            for (int i = 0; i < kLanes; ++i) key[i] = at_slot<T>(args_.keys, tile.slots[block * kLanes + i], head);
            for (int64_t dim = 0; dim < args_.keys.dim; dim += kDims) {
                const int64_t count = std::min(kDims, args_.keys.dim - dim);
                const bool is_direct = std::is_same_v<T, Element> && count == kDims;
                for (int i = 0; i < kLanes; ++i) {
                    if (!is_direct) copy(key[i] + dim, count, copied[i], kDims);
                    from[i] = reinterpret_cast<const float*>(is_direct ? static_cast<const void*>(key[i] + dim)
                                                                       : static_cast<const void*>(copied[i]));
                }
                transpose(from, keys_ + dim / A::kElements * kTileKeys + block * kLanes, kTileKeys);
            }
            prefetcher.stop();
        }
    }

    template <class T>
    void pack_values(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        const int64_t dims = args_.values.dim, whole = dims / kLanes * kLanes;
        float* line = values_;
        for (int64_t key = 0; key < tile.num_blocks * kLanes; key += A::kElements) {
            const T* first = at_slot<T>(args_.values, tile.slots[key], head);
            if constexpr (A::kElements == 2 && !std::is_same_v<T, Bfloat16>) {
                auto* rows = reinterpret_cast<Bfloat16*>(expanded_);
                copy(first, dims, rows, value_dim_);
                copy(at_slot<T>(args_.values, tile.slots[key + 1], head), dims, rows + value_dim_, value_dim_);
                interleave(rows, rows + value_dim_, value_dim_, line);
            } else if constexpr (A::kElements == 2) {
                const T* second = at_slot<T>(args_.values, tile.slots[key + 1], head);
                interleave(first, second, whole, line);
                if (whole < dims) {
                    Bfloat16 copied[2][kLanes];
                    copy(first + whole, dims - whole, copied[0], kLanes);
                    copy(second + whole, dims - whole, copied[1], kLanes);
                    interleave(copied[0], copied[1], kLanes, line + whole);
                }
            } else {
                copy(first, dims, line, value_dim_);
            }
            line += value_dim_;
            if (key % kLanes == 0) prefetcher.stop();
        }
    }

    template <class T, class Element>
    static void copy(const T* from, int64_t count, Element* to, int64_t padded) {
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

    static void interleave(const Bfloat16* a, const Bfloat16* b, int64_t count, float* line) {
        interleave_pairs(&a->bits, &b->bits, count, line);
    }

    const AttentionArgs& args_;
    const AttentionItem& item_;
    int64_t shared_, head_rows_, rows_, key_steps_, query_stride_, value_dim_, scratch_floats_;
    float factor_;  // scores in powers of 2
    bool reads_directly_;
    float *query_, *keys_, *values_, *scores_, *weights_, *zeros_, *expanded_;
    float *key_factors_ = nullptr, *value_factors_ = nullptr;  // of a tile's codes
    float *maximum_, *total_, *output_;
    float *merged_maximum_, *merged_total_, *merged_output_;
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
