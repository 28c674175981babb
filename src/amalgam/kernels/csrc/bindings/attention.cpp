// Exposes attention to Python; called by module.cpp. amalgam/kernels/backends/cpu/attention.py has checked the tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/cached.h"
#include "isa/table.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

const AttentionKernels& attention_kernels(const std::string& isa) { return *instruction_set(isa).attention; }

void make_plan(AttentionPlan* self, uintptr_t query_starts, uintptr_t context_lengths, int64_t num_sequences,
               uintptr_t block_tables, int64_t table_stride, int64_t num_blocks, int64_t block_size) {
    new (self) AttentionPlan(reinterpret_cast<const int64_t*>(query_starts),
                             reinterpret_cast<const int64_t*>(context_lengths), num_sequences,
                             reinterpret_cast<const int64_t*>(block_tables), table_stride, num_blocks, block_size);
}

void attend(const AttentionKernels& table, const AttentionPlan& plan, uintptr_t query, bool query_is_bfloat16,
            int64_t query_token_stride, int64_t query_head_stride, int64_t heads, uintptr_t keys,
            bool keys_are_bfloat16, int64_t key_slot_stride, int64_t key_head_stride, int64_t key_dim, uintptr_t values,
            bool values_are_bfloat16, int64_t value_slot_stride, int64_t value_head_stride, int64_t value_dim,
            int64_t kv_heads, uintptr_t out, float scale, int64_t window, uintptr_t sinks, int threads) {
    const auto dtype = [](bool is_bfloat16) { return is_bfloat16 ? DType::kBfloat16 : DType::kFloat32; };
    const auto view = [&](uintptr_t data, bool is_bfloat16, int64_t slot_stride, int64_t head_stride, int64_t dim) {
        return CacheView{reinterpret_cast<const void*>(data), dtype(is_bfloat16), slot_stride, head_stride, dim};
    };
    const AttentionArgs args{reinterpret_cast<const void*>(query),
                             dtype(query_is_bfloat16),
                             query_token_stride,
                             query_head_stride,
                             view(keys, keys_are_bfloat16, key_slot_stride, key_head_stride, key_dim),
                             view(values, values_are_bfloat16, value_slot_stride, value_head_stride, value_dim),
                             reinterpret_cast<void*>(out),
                             heads,
                             kv_heads,
                             scale,
                             window,
                             reinterpret_cast<const float*>(sinks)};
    paged_attention(table, plan, args, threads);
}

// Keys and values lie dense in their caches; strides of the rows are in elements.
void attend_cached(const AttentionKernels& table, const Kernels& kernels, const AttentionPlan& plan, uintptr_t query,
                   int64_t query_stride, uintptr_t key, int64_t key_stride, uintptr_t value, int64_t value_stride,
                   bool is_bfloat16, int64_t heads, int64_t kv_heads, int64_t dim, int64_t value_dim,
                   uintptr_t query_norm, uintptr_t key_norm, bool norm_is_bfloat16, float eps, uintptr_t cos,
                   uintptr_t sin, int64_t half, uintptr_t keys, uintptr_t values, uintptr_t slot_ids, int64_t num_slots,
                   uintptr_t out, float scale, int64_t window, uintptr_t sinks, int threads) {
    const auto data = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
    const auto floats = [](uintptr_t address) { return reinterpret_cast<const float*>(address); };
    const auto type = [](bool is_half) { return is_half ? DType::kBfloat16 : DType::kFloat32; };
    const DType dtype = type(is_bfloat16);
    CachedAttentionArgs args{};
    args.query = data(query);
    args.key = data(key);
    args.value = data(value);
    args.dtype = dtype;
    args.query_stride = query_stride;
    args.key_stride = key_stride;
    args.value_stride = value_stride;
    args.query_norm = data(query_norm);
    args.key_norm = data(key_norm);
    args.norm_dtype = type(norm_is_bfloat16);
    args.eps = eps;
    args.cos = floats(cos);
    args.sin = floats(sin);
    args.half = half;
    args.keys = data(keys);
    args.values = data(values);
    args.slot_ids = reinterpret_cast<const int64_t*>(slot_ids);
    args.num_slots = num_slots;
    args.attention.keys = {data(keys), dtype, kv_heads * dim, dim, dim};
    args.attention.values = {data(values), dtype, kv_heads * value_dim, value_dim, value_dim};
    args.attention.out = data(out);
    args.attention.heads = heads;
    args.attention.kv_heads = kv_heads;
    args.attention.scale = scale;
    args.attention.window = window;
    args.attention.sinks = floats(sinks);
    cached_attention(kernels, table, plan, args, threads);
}

void write(uintptr_t key, int64_t key_stride, uintptr_t keys, int64_t keys_stride, int64_t key_bytes, uintptr_t value,
           int64_t value_stride, uintptr_t values, int64_t values_stride, int64_t value_bytes, uintptr_t slot_ids,
           int64_t num_tokens, int64_t num_slots, int threads) {
    write_kv({reinterpret_cast<const void*>(key), key_stride, reinterpret_cast<void*>(keys), keys_stride, key_bytes},
             {reinterpret_cast<const void*>(value), value_stride, reinterpret_cast<void*>(values), values_stride,
              value_bytes},
             reinterpret_cast<const int64_t*>(slot_ids), num_tokens, num_slots, threads);
}

// Reads memory once, as fast as a plain loop can: the read bandwidth for benchmarks/attention.py.
uint64_t read_memory(uintptr_t address, int64_t bytes, int threads) {
    constexpr int64_t kWordsPerItem = 1 << 15;
    std::atomic<uint64_t> total{0};
    parallel_ranges(bytes / 8, kWordsPerItem, threads, [&](int64_t first, int64_t end) {
        const auto* words = reinterpret_cast<const uint64_t*>(address);
        uint64_t sums[8] = {};
        for (; first + 8 <= end; first += 8) {
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; ++lane) sums[lane] += words[first + lane];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

}  // namespace

// Arguments are positional: the calls are made in every layer of every step, and matching names costs time.
void bind_attention(nb::module_& module) {
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<AttentionPlan>(module, "AttentionPlan")
        .def("__init__", &make_plan)
        .def_prop_ro("num_tokens", &AttentionPlan::num_tokens)
        .def_prop_ro("num_slots", &AttentionPlan::num_slots);
    nb::class_<AttentionKernels>(module, "AttentionKernels")
        .def_prop_ro("isa", [](const AttentionKernels& table) { return table.isa; })
        .def("attend", &attend, Unlocked())
        .def("attend_cached", &attend_cached, Unlocked());
    module.def("attention_kernels", &attention_kernels, nb::rv_policy::reference);
    module.def("read_memory", &read_memory, Unlocked());
    module.def("write_kv", &write, Unlocked());
}

}  // namespace amalgam
