// Paged attention: which rows of a step see which keys (AttentionPlan), one layer's call, and its kernels.
//
// Order of arithmetic. A row is one query head of one token. Its keys are cut at absolute positions into ranges of
// kRangeKeys and those into tiles of kTileKeys. Within a range an online softmax (Milakov and Gimelshein 2018,
// arXiv:1805.02867) goes over the tiles, starting empty; ranges are merged in order. All cuts depend on positions only,
// and a tile that a row does not see changes nothing as long as its values are finite, so that a row's bits depend
// neither on the rows computed with it nor on how the work was shared out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product/matrix.h"

namespace amalgam {

constexpr int64_t kTileKeys = 64;
constexpr int64_t kRangeKeys = 256;

// A step's sequences, copied from the tensors of AttentionBatch; the same for all layers.
class AttentionPlan {
 public:
    struct Sequence {
        int64_t first_token;  // row of the query tensor
        int64_t num_tokens;
        int64_t first_position;
        const int32_t* block_ids;
    };

    // query_starts: [num_sequences + 1]; context_lengths: [num_sequences]; block_tables: [num_sequences, num_blocks],
    // table_stride elements from row to row. Throws std::invalid_argument where they contradict each other.
    AttentionPlan(const int64_t* query_starts, const int64_t* context_lengths, int64_t num_sequences,
                  const int64_t* block_tables, int64_t table_stride, int64_t num_blocks, int64_t block_size);
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;

    const std::vector<Sequence>& sequences() const { return sequences_; }
    int64_t block_size() const { return block_size_; }
    int64_t num_tokens() const { return num_tokens_; }
    int64_t num_slots() const { return num_slots_; }  // slots that a cache needs at least

 private:
    std::vector<Sequence> sequences_;
    std::vector<int32_t> block_ids_;
    int64_t block_size_;
    int64_t num_tokens_;
    int64_t num_slots_ = 0;
};

// [slots, kv_heads, dim], dense in the last dimension; strides in elements. Codes have a scale for each slot and head:
// a value is its code times that.
struct CacheView {
    void* data;
    DType dtype;
    int64_t slot_stride;
    int64_t head_stride;
    int64_t dim;
    float* scales;  // [slots, kv_heads], dense; null where the cache has no codes
};

struct AttentionArgs {
    const void* query;  // [tokens, heads, keys.dim], dense in the last dimension
    DType query_dtype;
    int64_t query_token_stride;
    int64_t query_head_stride;
    CacheView keys, values;
    void* out;  // [tokens, heads, values.dim] of the query's type, dense
    int64_t heads;
    int64_t kv_heads;
    float scale;
    int64_t window;      // a token sees so many positions, itself included; 0: all before it
    int64_t chunk;       // a token sees no position before the last multiple of it; 0: no such cut
    const float* sinks;  // [heads] or null
    float softcap;       // scores become softcap * tanh(score / softcap); 0: they stay
};

// The first position that a token at `position` sees.
inline int64_t first_visible(const AttentionArgs& args, int64_t position) {
    const int64_t chunk = args.chunk > 0 ? position / args.chunk * args.chunk : 0;
    return args.window > 0 ? std::max(chunk, position - args.window + 1) : chunk;
}

// Work for one thread: consecutive positions of a sequence, some KV heads, and a range of keys. Rows are numbered
// [kv head, position, shared head].
struct AttentionItem {
    const int32_t* block_ids;
    int64_t block_size;
    int64_t first_token;
    int64_t first_position;
    int64_t num_positions;
    int64_t first_kv_head;
    int64_t num_kv_heads;
    int64_t first_key;  // the keys that any of the rows sees, and that are this item's share of them
    int64_t end_key;
    // Null: the item has all keys and writes `out`. Otherwise its maxima [rows], totals [rows] and outputs [rows,
    // padded value dim], which `merge` reads.
    float* partial;
};

struct AttentionKernels {
    const char* isa;
    // Floats of 64-byte aligned scratch memory that an item needs.
    int64_t (*scratch_floats)(const AttentionArgs&, const AttentionItem&);
    // `next`: what this thread will probably compute next, or null; its first keys are fetched towards the end.
    // is_first: that was not done for this item.
    void (*attend)(const AttentionArgs&, const AttentionItem&, const AttentionItem* next, bool is_first,
                   float* scratch);
    // Merges the partial results of num_ranges items that differ in their keys only, `stride` floats apart.
    void (*merge)(const AttentionArgs&, const AttentionItem&, int64_t num_ranges, int64_t stride, float* scratch);
    // One KV head: sums over the heads, in their order, of weights [tokens, heads] times a score above 0; out
    // [tokens, keys], `stride` floats from token to token. Whole blocks of 16 keys from first_key on are written.
    void (*score)(const AttentionArgs&, const AttentionItem&, const float* weights, float* out, int64_t stride,
                  float* scratch);
};

inline int64_t padded_value_dim(const AttentionArgs& args) { return (args.values.dim + 15) / 16 * 16; }

inline int64_t item_rows(const AttentionArgs& args, const AttentionItem& item) {
    return item.num_kv_heads * item.num_positions * (args.heads / args.kv_heads);
}

// Floats behind AttentionItem::partial.
inline int64_t partial_floats(const AttentionArgs& args, const AttentionItem& item) {
    return (item_rows(args, item) * (2 + padded_value_dim(args)) + 15) / 16 * 16;
}

void paged_attention(const AttentionKernels& kernels, const AttentionPlan& plan, const AttentionArgs& args,
                     int num_threads);

// What an indexer finds keys by: out[token, key] = sum over heads of weights[token, head] * max(0, query . key),
// float32 [tokens, stride]; minus infinity behind the token. stride: a multiple of kTileKeys. args: query and keys of
// one KV head; there are no values.
void index_scores(const AttentionKernels& kernels, const AttentionPlan& plan, const AttentionArgs& args,
                  const float* weights, float* out, int64_t stride, int num_threads);

// cache[slot, head] = row, [dim] in `dtype`. As codes (E4M3 or int8): the scale is the largest magnitude divided by the
// largest code, 0 if there is none, and NaN where a value is not finite; the codes are the nearest ones.
void store_row(const void* row, DType dtype, const CacheView& cache, int64_t heads, int64_t slot, int64_t head);

// cache[slot_ids[t]] = rows[t] for keys and for values; everything is dense.
struct WriteArgs {
    const void* rows;  // [tokens, heads, dim]
    DType dtype;
    CacheView cache;
    int64_t heads;
};

// Throws std::out_of_range at a slot that is not in [0, num_slots).
void check_slots(const int64_t* slot_ids, int64_t num_tokens, int64_t num_slots);

// Throws std::out_of_range, before anything is written, at a slot that is not in [0, num_slots).
void write_kv(const WriteArgs& keys, const WriteArgs& values, const int64_t* slot_ids, int64_t num_tokens,
              int64_t num_slots, int num_threads);

}  // namespace amalgam
