// The memory that the rows of an item are computed in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.h"
#include "attention/microkernel.h"
#include "product/unit_tiles.h"

namespace amalgam {
namespace {

// Cut out of the item's scratch memory, each piece from a whole line on. An element is what keys and values are
// multiplied as; `elements` of them fill 32 bits.
//
// The matrix unit reads and writes whole tiles of rows, of which the last may reach beyond those of a KV head: queries
// and results have room for those too, whose contents mean nothing.
struct ItemMemory {
    const AttentionArgs& args;
    const AttentionItem& item;
    int64_t shared;     // heads with the same KV head
    int64_t head_rows;  // of one KV head
    int64_t rows;
    int64_t unit_rows;     // of a tile of the matrix unit, where it is used
    int64_t rows_at_once;  // of one product: scores and weights have room for them
    int64_t head_places;   // rows of a KV head and what fills up its last tile, in `query` and `range_output`
    int64_t key_steps;     // words of a query
    int64_t query_stride;  // floats from query to query
    int64_t value_dim;     // padded
    float *query, *keys, *values, *scores, *weights, *zeros, *expanded;
    float *key_factors = nullptr, *value_factors = nullptr;  // of a tile's codes
    float *range_maximum, *range_total, *range_output;       // of the range under way
    float *merged_maximum, *merged_total, *merged_output;
    int64_t scratch_floats;  // all of it
    float score_factor;      // scores times it are exponents of 2; with a cap, after the cap

    ItemMemory(const AttentionArgs& args, const AttentionItem& item, float* scratch, int64_t elements, bool uses_unit)
        : args(args), item(item), score_factor((args.softcap > 0.0f ? 1.0f : args.scale) * kLog2E) {
        shared = args.heads / args.kv_heads;
        head_rows = item.num_positions * shared;
        rows = item_rows(args, item);
        const RowTiles tiles(head_rows);
        unit_rows = tiles.height;
        rows_at_once = uses_unit ? 2 * unit_rows : kTileRows;
        head_places = uses_unit ? tiles.count * unit_rows : head_rows;
        const int64_t places = item.num_kv_heads * head_places;
        key_steps = (args.keys.dim + elements - 1) / elements;
        query_stride = round_up(key_steps, kLanes);
        value_dim = padded_value_dim(args);
        float* at = scratch;
        const auto take = [&](int64_t count) {
            float* piece = at;
            at += round_up(count, kLanes);
            return piece;
        };
        query = take(places * query_stride);
        keys = take(query_stride * kTileKeys);
        values = take(kTileKeys / elements * value_dim);
        scores = take(rows_at_once * kTileKeys);
        weights = take(rows_at_once * kTileKeys / elements);
        zeros = take(std::max(args.keys.dim, args.values.dim) + kLanes);
        if (args.keys.scales != nullptr) key_factors = take(kTileKeys);
        if (args.values.scales != nullptr) value_factors = take(kTileKeys);
        expanded = take(std::max({kLanes * query_stride, value_dim, int64_t{kLanes} * 4 * kLanes}));
        range_maximum = take(rows);
        range_total = take(rows * kLanes);
        range_output = take(places * value_dim);
        merged_maximum = take(rows);
        merged_total = take(rows);
        merged_output = take(rows * value_dim);
        scratch_floats = at - scratch;
    }

    float* query_of(int64_t row) const { return query + place_of(row) * query_stride; }
    float* output_of(int64_t row) const { return range_output + place_of(row) * value_dim; }

    // Rows are numbered [kv head, position, shared head].
    int64_t head_of(int64_t row) const { return item.first_kv_head * shared + row / head_rows * shared + row % shared; }
    int64_t token_of(int64_t row) const { return item.first_token + row % head_rows / shared; }

 private:
    int64_t place_of(int64_t row) const { return row / head_rows * head_places + row % head_rows; }
};

}  // namespace
}  // namespace amalgam
