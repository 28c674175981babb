// Attention, and the cache that it reads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <new>
#include <optional>
#include <string>
#include <tuple>

#include "attention/cached.h"
#include "bindings/bindings.h"
#include "bindings/memory.h"
#include "bindings/tensor.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

void make_plan(AttentionPlan* self, const Tensor& query_starts, const Tensor& context_lengths,
               const Tensor& block_tables, int64_t block_size) {
    context_lengths.dense("context_lengths", kInt64, {kAny});
    const int64_t count = context_lengths.shape(0);
    query_starts.dense("query_starts", kInt64, {count + 1});
    block_tables.rows("block_tables", kInt64, {count, kAny});
    new (self)
        AttentionPlan(query_starts.data<const int64_t>(), context_lengths.data<const int64_t>(), count,
                      block_tables.data<const int64_t>(), block_tables.stride(0), block_tables.shape(1), block_size);
}

// The parts of an attention's arguments that both functions below have.
AttentionArgs attention_args(const AttentionPlan& plan, int64_t tokens, int64_t heads, int64_t num_slots,
                             int64_t kv_heads, float scale, std::optional<int64_t> window, const Tensor& sinks,
                             std::optional<float> softcap, std::optional<int64_t> chunk) {
    AttentionArgs args{};
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.scale = scale;
    args.window = window.value_or(0);
    args.softcap = softcap.value_or(0.0f);
    args.chunk = chunk.value_or(0);
    if (sinks) args.sinks = sinks.dense("sinks", kFloat32, {heads}).data<const float>();
    require(softcap.value_or(1.0f) > 0.0f, "softcap is " + std::to_string(args.softcap) + "; needed: above 0");
    require(chunk.value_or(1) >= 1, "chunk is " + std::to_string(args.chunk) + "; needed: at least 1");
    require(window.value_or(1) >= 1, "window is " + std::to_string(args.window) + "; needed: at least 1");
    require(kv_heads > 0 && heads % kv_heads == 0,
            "keys has " + std::to_string(kv_heads) + " heads; needed: a divisor of " + std::to_string(heads));
    require(plan.num_tokens() == tokens,
            "query has " + std::to_string(tokens) + " rows; needed: " + std::to_string(plan.num_tokens()));
    require(plan.num_slots() <= num_slots,
            "keys has " + std::to_string(num_slots) + " slots; needed: " + std::to_string(plan.num_slots()));
    return args;
}

void attend(const AttentionKernels& table, const AttentionPlan& plan, const Tensor& query, const CacheTuple& keys,
            const CacheTuple& values, const Tensor& out, float scale, std::optional<int64_t> window,
            const Tensor& sinks, std::optional<float> softcap, std::optional<int64_t> chunk, int threads) {
    const CacheView key_view = cache_view("keys", keys, 1), value_view = cache_view("values", values, 1);
    const Tensor& first = std::get<0>(keys);
    std::get<0>(values).rows("values", kCaches, {first.shape(0), first.shape(1), kAny});
    query.rows("query", kActivations, {kAny, kAny, first.shape(2)});
    const int64_t tokens = query.shape(0), heads = query.shape(1);
    out.dense("out", query.kind(), {tokens, heads, value_view.dim});
    require(key_view.dim > 0, "keys is " + first.describe() + "; needed: dimensions");
    AttentionArgs args =
        attention_args(plan, tokens, heads, first.shape(0), first.shape(1), scale, window, sinks, softcap, chunk);
    args.keys = key_view;
    args.values = value_view;
    args.query = query.data();
    args.query_dtype = query.dtype();
    args.query_token_stride = query.stride(0);
    args.query_head_stride = query.stride(1);
    args.out = out.data();
    if (out.size() > 0) paged_attention(table, plan, args, threads);
}

// See index_scores. out: [tokens, keys], keys a multiple of kTileKeys that no token's position reaches.
void score_keys(const AttentionKernels& table, const AttentionPlan& plan, const Tensor& query, const CacheTuple& keys,
                const Tensor& weights, const Tensor& out, int threads) {
    const CacheView view = cache_view("keys", keys, 1);
    const Tensor& first = std::get<0>(keys);
    query.rows("query", kActivations, {kAny, kAny, first.shape(2)});
    const int64_t tokens = query.shape(0), heads = query.shape(1);
    require(first.shape(1) == 1 && view.dim > 0 && heads > 0, "keys is " + first.describe() + "; needed: one head");
    weights.dense("weights", kFloat32, {tokens, heads});
    out.dense("out", kFloat32, {tokens, kAny});
    AttentionArgs args = attention_args(plan, tokens, heads, first.shape(0), 1, 1.0f, {}, Tensor(), {}, {});
    for (const auto& sequence : plan.sequences()) {
        require(
            out.shape(1) % kTileKeys == 0 && sequence.first_position + sequence.num_tokens <= out.shape(1),
            "out is " + out.describe() + "; needed: columns for all keys, a multiple of " + std::to_string(kTileKeys));
    }
    args.keys = args.values = view;
    args.values.dim = 0;
    args.values.scales = nullptr;
    args.query = query.data();
    args.query_dtype = query.dtype();
    args.query_token_stride = query.stride(0);
    args.query_head_stride = query.stride(1);
    index_scores(table, plan, args, weights.data<const float>(), out.data<float>(), out.shape(1), threads);
}

// norms: of queries and keys; rotary: cos and sin; both or neither of each.
void attend_cached(const AttentionKernels& table, const Kernels& kernels, const AttentionPlan& plan,
                   const std::tuple<Tensor, Tensor, Tensor>& rows, const CacheTuple& keys, const CacheTuple& values,
                   const Tensor& slot_ids, const std::tuple<Tensor, Tensor>& norms, float eps, bool rounds_last,
                   const std::tuple<Tensor, Tensor>& rotary, bool is_interleaved, bool norms_last, const Tensor& out,
                   float scale, std::optional<int64_t> window, const Tensor& sinks, std::optional<float> softcap,
                   std::optional<int64_t> chunk, int threads) {
    const auto& [query, key, value] = rows;
    const auto& [query_norm, key_norm] = norms;
    const auto& [cos, sin] = rotary;
    const CacheView key_view = cache_view("keys", keys), value_view = cache_view("values", values);
    query.rows("query", kActivations, {kAny, kAny});
    const unsigned kind = query.kind();
    const int64_t tokens = query.shape(0), num_slots = std::get<0>(keys).shape(0),
                  kv_heads = std::get<0>(keys).shape(1);
    std::get<0>(values).dense("values", kCaches, {num_slots, kv_heads, kAny});
    const int64_t dim = key_view.dim, value_dim = value_view.dim, heads = dim > 0 ? query.shape(1) / dim : 0;
    query.rows("query", kind, {tokens, heads * dim});
    key.rows("key", kind, {tokens, kv_heads * dim});
    value.rows("value", kind, {tokens, kv_heads * value_dim});
    slot_ids.dense("slot_ids", kInt64, {tokens});
    out.dense("out", kind, {tokens, heads * value_dim});
    CachedAttentionArgs args{};
    args.attention = attention_args(plan, tokens, heads, num_slots, kv_heads, scale, window, sinks, softcap, chunk);
    args.attention.keys = key_view;
    args.attention.values = value_view;
    args.attention.out = out.data();
    args.query = query.data();
    args.key = key.data();
    args.value = value.data();
    args.dtype = query.dtype();
    args.query_stride = query.stride(0);
    args.key_stride = key.stride(0);
    args.value_stride = value.stride(0);
    if (query_norm) {
        query_norm.dense("query_norm", kActivations, {dim});
        key_norm.like("key_norm", query_norm);
        args.query_norm = query_norm.data();
        args.key_norm = key_norm.data();
        args.norm_dtype = query_norm.dtype();
    }
    args.eps = eps;
    args.rounds_last = rounds_last;
    args.is_interleaved = is_interleaved;
    args.norms_last = norms_last;
    if (cos) {
        cos.dense("cos", kFloat32, {tokens, kAny});
        sin.like("sin", cos);
        require(2 * cos.shape(1) <= dim,
                "cos is " + cos.describe() + "; needed: at most " + std::to_string(dim / 2) + " columns");
        args.cos = cos.data<const float>();
        args.sin = sin.data<const float>();
        args.half = cos.shape(1);
    }
    args.slot_ids = slot_ids.data<const int64_t>();
    args.num_slots = num_slots;
    if (out.size() > 0) cached_attention(kernels, table, plan, args, threads);
}

void write_rows(const CacheTuple& keys, const CacheTuple& values, const Tensor& key, const Tensor& value,
                const Tensor& slot_ids, int threads) {
    slot_ids.dense("slot_ids", kInt64, {kAny});
    const int64_t num_slots = std::get<0>(keys).dense("keys", kCaches, {kAny, kAny, kAny}).shape(0);
    std::get<0>(values).dense("values", kCaches, {num_slots, kAny, kAny});
    const auto args = [&](const char* name, const Tensor& rows, const CacheView& cache, const Tensor& like) {
        rows.dense(name, kFloats, {slot_ids.size(), like.shape(1), like.shape(2)});
        return WriteArgs{rows.data(), rows.dtype(), cache, like.shape(1)};
    };
    write_kv(args("key", key, cache_view("keys", keys), std::get<0>(keys)),
             args("value", value, cache_view("values", values), std::get<0>(values)), slot_ids.data<const int64_t>(),
             slot_ids.size(), num_slots, threads);
}

}  // namespace

void bind_attention(nb::module_& module) {
    nb::class_<AttentionPlan>(module, "AttentionPlan")
        .def("__init__", &make_plan)
        .def_prop_ro("num_tokens", &AttentionPlan::num_tokens)
        .def_prop_ro("num_slots", &AttentionPlan::num_slots);
    nb::class_<AttentionKernels>(module, "AttentionKernels")
        .def_prop_ro("isa", [](const AttentionKernels& table) { return table.isa; })
        .def("attend", &attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional(),
             optional(), optional(), optional(), nb::arg(), Unlocked())
        .def("attend_cached", &attend_cached, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional(),
             optional(), optional(), optional(), nb::arg(), Unlocked())
        .def("score_keys", &score_keys, Unlocked());
    module.attr("score_tile") = kTileKeys;
    module.def("write_kv", &write_rows, Unlocked());
}

}  // namespace amalgam
