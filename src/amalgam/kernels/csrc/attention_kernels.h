// Attention of one item: packs each tile of keys and values once, runs the item's rows over it.
//
// Both products are one microkernel, rows of 32-bit operands times lines of 16 lanes. An operand and a lane hold two
// bfloat16 where query, keys and values are bfloat16 (then the softmax weights are rounded to bfloat16, and their total
// is that of the rounded ones), and one float otherwise. Packed tiles:
//
//     keys    [steps][4 blocks][16 keys]       a step is the operand's 2 or 1 dimensions
//     values  [steps][blocks][16 dimensions]   a step is the operand's 2 or 1 keys
//
// Include one of simd_*.h and the functions that attention_portable.cpp explains first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>

#include "attention.h"

namespace amalgam {
namespace {

constexpr int kLanes = 16;
constexpr int kTileBlocks = static_cast<int>(kTileKeys) / kLanes;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// What one 32-bit lane holds.
struct PairArithmetic {
    using Element = Bfloat16;
    using Line = Pairs;
    using Word = Operand4;
    static constexpr int kElements = 2;
    static Line load(const float* p) { return load_pairs(reinterpret_cast<const uint8_t*>(p)); }
    static Word word(const float* p) { return broadcast4(p); }
    static Floats multiply_add(Floats sum, const Line& line, const Word& word) { return dot_pairs(sum, line, word); }
};

struct FloatArithmetic {
    using Element = float;
    using Line = Floats;
    using Word = Floats;
    static constexpr int kElements = 1;
    static Line load(const float* p) { return load_floats(p); }
    static Word word(const float* p) { return broadcast_float(p); }
    static Floats multiply_add(Floats sum, const Line& line, const Word& word) { return fused(line, word, sum); }
};

// 2^x for x <= 0 to about 1 unit in the last place, 0 below 2^-126; NaN stays. Only operations that are rounded the
// same way everywhere. Coefficients: Cephes exp2f.
inline Floats exp2_lanes(Floats x) {
    const Floats rounder = broadcast(12582912.0f);  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Floats shifted = add(x, rounder);
    const Floats fraction = subtract(x, subtract(shifted, rounder));
    Floats result = broadcast(1.535336188319500e-4f);
    for (const float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f}) {
        result = add(mul(result, fraction), broadcast(coefficient));
    }
    return zero_below(scale_exponent(result, shifted), x, -126.0f);
}

inline float exp2_scalar(float x) {
    alignas(64) float lanes[kLanes];
    store_floats(lanes, exp2_lanes(broadcast(x)));
    return lanes[0];
}

inline float sum_lanes(const float* lanes) {
    float sum[kLanes];
    std::memcpy(sum, lanes, sizeof sum);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
    }
    return sum[0];
}

// Brings the next tile's cache lines closer, a few keys at each call, while this one is computed.
struct Prefetcher {
    const int64_t* slots = nullptr;
    int64_t num_keys = 0;
    int64_t step = 0;
    int64_t next = 0;
    const uint8_t *keys = nullptr, *values = nullptr;
    int64_t key_stride = 0, value_stride = 0, key_bytes = 0, value_bytes = 0;

    void advance() {
        const int64_t end = std::min(next + step, num_keys);
        for (; next < end; ++next) {
            if (slots[next] < 0) continue;
            const uint8_t* key = keys + slots[next] * key_stride;
            for (int64_t at = 0; at < key_bytes; at += kLineBytes) prefetch(key + at);
            const uint8_t* value = values + slots[next] * value_stride;
            for (int64_t at = 0; at < value_bytes; at += kLineBytes) prefetch(value + at);
        }
    }
};

// c [M, N * 16] = c * factor + a b; without factors, c = a b. a: rows of words; b: lines, b_stride floats from step to
// step.
template <class A, int M, int N>
inline void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
                     int64_t c_stride, const float* factor) {
    Floats sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            sum[m][n] = factor == nullptr
                            ? zero_floats()
                            : mul(load_floats(c + m * c_stride + n * kLanes), broadcast_float(factor + m));
        }
    }
    for (int64_t step = 0; step < steps; ++step, b += b_stride) {
        typename A::Line line[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) line[n] = A::load(b + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const typename A::Word word = A::word(a + m * a_stride + step);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[m][n] = A::multiply_add(sum[m][n], line[n], word);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_floats(c + m * c_stride + n * kLanes, sum[m][n]);
    }
}

// The same over any number of blocks of 16 columns. Few rows take more blocks at a time, to have enough sums in flight.
template <class A, int M>
inline void multiply_blocks(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t steps, float* c,
                            int64_t c_stride, const float* factor, int64_t blocks, Prefetcher& prefetcher) {
    constexpr int kBlocks = std::max(1, std::min(4, kAccumulators / M));
    int64_t block = 0;
    for (; block + kBlocks <= blocks; block += kBlocks) {
        multiply<A, M, kBlocks>(a, a_stride, b + block * kLanes, b_stride, steps, c + block * kLanes, c_stride, factor);
        prefetcher.advance();
    }
    for (; block < blocks; ++block) {
        multiply<A, M, 1>(a, a_stride, b + block * kLanes, b_stride, steps, c + block * kLanes, c_stride, factor);
    }
}

// A tile of keys as seen by the rows of an item.
struct Tile {
    int64_t first_key;
    int64_t num_blocks;        // of 16 keys, up to the last that any row sees
    int64_t slots[kTileKeys];  // -1: not seen by any row; it may not exist
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
        factor_ = args.scale * kLog2E;
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
        maximum_ = take(rows_);
        total_ = take(rows_ * kLanes);
        output_ = take(rows_ * value_dim_);
        merged_maximum_ = take(rows_);
        merged_total_ = take(rows_);
        merged_output_ = take(rows_ * value_dim_);
        scratch_floats_ = at - scratch;
    }

    int64_t scratch_floats() const { return scratch_floats_; }

    void attend() {
        std::fill_n(zeros_, std::max(args_.keys.dim, args_.values.dim) + kLanes, 0.0f);
        gather_query();
        if (item_.partial == nullptr) begin_merge();
        for (int64_t first = item_.first_key; first < item_.end_key;) {
            const int64_t end = std::min(first / kRangeKeys * kRangeKeys + kRangeKeys, item_.end_key);
            attend_range(first, end);
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

   private:
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

    void attend_range(int64_t first_key, int64_t end_key) {
        std::fill_n(maximum_, rows_, kNegativeInfinity);
        std::fill_n(total_, rows_ * kLanes, 0.0f);
        std::fill_n(output_, rows_ * value_dim_, 0.0f);
        Tile tiles[2];
        Tile *tile = &tiles[0], *next = &tiles[1];
        locate(first_key / kTileKeys * kTileKeys, *tile);
        for (;;) {
            const int64_t next_key = tile->first_key + kTileKeys;
            const bool is_last = next_key >= item_.end_key;  // the first tile of the next range is fetched, too
            if (!is_last) locate(next_key, *next);
            for (int64_t head = 0; head < item_.num_kv_heads; ++head) {
                const bool is_last_head = head + 1 == item_.num_kv_heads;
                Prefetcher prefetcher;
                if (!is_last_head) {
                    aim(prefetcher, *tile, head + 1);
                } else if (!is_last) {
                    aim(prefetcher, *next, 0);
                }
                attend_tile(*tile, head, prefetcher);
            }
            if (next_key >= end_key) return;
            std::swap(tile, next);
        }
    }

    void aim(Prefetcher& prefetcher, const Tile& tile, int64_t head) const {
        const CacheView &keys = args_.keys, &values = args_.values;
        head += item_.first_kv_head;
        prefetcher.slots = tile.slots;
        prefetcher.num_keys = tile.num_blocks * kLanes;
        prefetcher.keys = static_cast<const uint8_t*>(advance(keys.data, keys.dtype, head * keys.head_stride));
        prefetcher.values = static_cast<const uint8_t*>(advance(values.data, values.dtype, head * values.head_stride));
        prefetcher.key_stride = keys.slot_stride * dtype_bytes(keys.dtype);
        prefetcher.value_stride = values.slot_stride * dtype_bytes(values.dtype);
        prefetcher.key_bytes = keys.dim * dtype_bytes(keys.dtype);
        prefetcher.value_bytes = values.dim * dtype_bytes(values.dtype);
        // attend_tile comes by about so often: packing, and for each row its softmax and half a product.
        const int64_t stops = 2 * kTileBlocks + head_rows_ + head_rows_ / 2;
        prefetcher.step = (prefetcher.num_keys + stops - 1) / stops;
    }

    void locate(int64_t first_key, Tile& tile) const {
        tile.first_key = first_key;
        const int64_t end = std::min<int64_t>(item_.end_key - first_key, kTileKeys);
        tile.num_blocks = (end + kLanes - 1) / kLanes;
        int64_t block = first_key / item_.block_size, offset = first_key % item_.block_size;
        for (int64_t key = 0; key < kTileKeys; ++key) {
            const bool is_seen = key < end && first_key + key >= item_.first_key;
            tile.slots[key] = is_seen ? item_.block_ids[block] * item_.block_size + offset : -1;
            if (++offset == item_.block_size) {
                offset = 0;
                ++block;
            }
        }
    }

    // --- One tile of keys, one KV head ---

    void attend_tile(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        if (args_.keys.dtype == DType::kFloat32) {
            pack_keys<float>(tile, head, prefetcher);
        } else {
            pack_keys<Bfloat16>(tile, head, prefetcher);
        }
        if (args_.values.dtype == DType::kFloat32) {
            pack_values<float>(tile, head, prefetcher);
        } else {
            pack_values<Bfloat16>(tile, head, prefetcher);
        }
        const int64_t first = head * head_rows_, end = first + head_rows_;
        int64_t row = first;
        for (; row + kTileRows <= end; row += kTileRows) attend_rows<kTileRows>(tile, row, row - first, prefetcher);
        if (row < end) attend_rest<kTileRows - 1>(tile, row, row - first, end - row, prefetcher);
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
        float factors[M];
        for (int m = 0; m < M; ++m) {
            const int64_t last = item_.first_position + (local + m) / shared_ - tile.first_key;
            const int64_t first = args_.window > 0 ? last - args_.window + 1 : 0;
            factors[m] = softmax(m, row + m, blocks, first, last);
            prefetcher.advance();
        }
        multiply_blocks<A, M>(weights_, kTileKeys / A::kElements, values_, value_dim_, blocks * kLanes / A::kElements,
                              output_ + row * value_dim_, value_dim_, factors, value_dim_ / kLanes, prefetcher);
    }

    // Scores of a row → weights; keys [first, last] of the tile are visible. Returns what older results are to be
    // multiplied with.
    float softmax(int m, int64_t row, int64_t blocks, int64_t first, int64_t last) {
        const bool is_whole = first <= 0 && last >= blocks * kLanes - 1;
        const Floats factor = broadcast(factor_);
        Floats score[kTileBlocks];
        Floats highest = broadcast(maximum_[row]);
#pragma GCC unroll 4
        for (int block = 0; block < kTileBlocks; ++block) {
            score[block] = broadcast(kNegativeInfinity);
            if (block >= blocks) continue;
            score[block] = mul(load_floats(scores_ + m * kTileKeys + block * kLanes), factor);
            if (!is_whole) {
                const int64_t start = block * kLanes;
                score[block] = keep_range(score[block], static_cast<int>(std::clamp<int64_t>(first - start, 0, kLanes)),
                                          static_cast<int>(std::clamp<int64_t>(last + 1 - start, 0, kLanes)));
            }
            highest = maximum(score[block], highest);
        }
        const float old_maximum = maximum_[row];
        const float new_maximum = highest_lane(highest);
        const float safe = new_maximum == kNegativeInfinity ? 0.0f : new_maximum;  // nothing seen yet
        const float correction = old_maximum == new_maximum ? 1.0f : exp2_scalar(old_maximum - safe);
        maximum_[row] = new_maximum;
        const Floats offset = broadcast(safe);
        Floats total = mul(load_floats(total_ + row * kLanes), broadcast(correction));
        float* weights = weights_ + m * (kTileKeys / A::kElements);
#pragma GCC unroll 4
        for (int block = 0; block < kTileBlocks; ++block) {
            if (block >= blocks) continue;
            Floats weight = exp2_lanes(subtract(score[block], offset));
            if constexpr (A::kElements == 2) {
                weight = store_bfloat16(weights + block * kLanes / 2, weight);
            } else {
                store_floats(weights + block * kLanes, weight);
            }
            total = add(total, weight);
        }
        store_floats(total_ + row * kLanes, total);
        return correction;
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
        using Element = typename A::Element;
        constexpr int64_t kDims = kLanes * A::kElements;  // of one transposition
        constexpr bool kIsDirect = sizeof(T) == sizeof(Element);
        alignas(64) Element copied[kLanes][kDims];
        const float* from[kLanes];
        for (int64_t block = 0; block < tile.num_blocks; ++block) {
            const T* key[kLanes];
            for (int i = 0; i < kLanes; ++i) key[i] = at_slot<T>(args_.keys, tile.slots[block * kLanes + i], head);
            for (int64_t dim = 0; dim < args_.keys.dim; dim += kDims) {
                const int64_t count = std::min(kDims, args_.keys.dim - dim);
                const bool is_direct = kIsDirect && count == kDims;
                for (int i = 0; i < kLanes; ++i) {
                    if (!is_direct) copy(key[i] + dim, count, copied[i], kDims);
                    from[i] = reinterpret_cast<const float*>(is_direct ? static_cast<const void*>(key[i] + dim)
                                                                       : static_cast<const void*>(copied[i]));
                }
                transpose(from, keys_ + dim / A::kElements * kTileKeys + block * kLanes, kTileKeys);
            }
            prefetcher.advance();
        }
    }

    template <class T>
    void pack_values(const Tile& tile, int64_t head, Prefetcher& prefetcher) {
        const int64_t dims = args_.values.dim, whole = dims / kLanes * kLanes;
        float* line = values_;
        for (int64_t key = 0; key < tile.num_blocks * kLanes; key += A::kElements) {
            const T* first = at_slot<T>(args_.values, tile.slots[key], head);
            if constexpr (A::kElements == 2) {
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
            if (key % kLanes == 0) prefetcher.advance();
        }
    }

    template <class T, class Element>
    static void copy(const T* from, int64_t count, Element* to, int64_t padded) {
        if constexpr (sizeof(T) == sizeof(Element)) {
            std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
        } else if constexpr (sizeof(T) < sizeof(Element)) {
            for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
        }  // float32 is never packed as bfloat16
        std::memset(static_cast<void*>(to + count), 0, static_cast<size_t>(padded - count) * sizeof(Element));
    }

    static void interleave(const float*, const float*, int64_t, float*) {}  // float32 is never packed as bfloat16
    static void interleave(const Bfloat16* a, const Bfloat16* b, int64_t count, float* line) {
        interleave_pairs(&a->bits, &b->bits, count, line);
    }

    const AttentionArgs& args_;
    const AttentionItem& item_;
    int64_t shared_, head_rows_, rows_, key_steps_, query_stride_, value_dim_, scratch_floats_;
    float factor_;  // scores in powers of 2
    float *query_, *keys_, *values_, *scores_, *weights_, *zeros_;
    float *maximum_, *total_, *output_;
    float *merged_maximum_, *merged_total_, *merged_output_;
};

inline bool works_in_pairs(const AttentionArgs& args) {
    return args.query_dtype == DType::kBfloat16 && args.keys.dtype == DType::kBfloat16 &&
           args.values.dtype == DType::kBfloat16;
}

int64_t attention_scratch(const AttentionArgs& args, const AttentionItem& item) {
    return works_in_pairs(args) ? Attention<PairArithmetic>(args, item, nullptr).scratch_floats()
                                : Attention<FloatArithmetic>(args, item, nullptr).scratch_floats();
}

void attend(const AttentionArgs& args, const AttentionItem& item, float* scratch) {
    if (works_in_pairs(args)) {
        Attention<PairArithmetic>(args, item, scratch).attend();
    } else {
        Attention<FloatArithmetic>(args, item, scratch).attend();
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
