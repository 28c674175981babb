// The extension module amalgam._native: exposes the kernels of every instruction set to Python.
//
// What comes in is checked here (tensor.h, program.h) and nowhere else: the kernels are given addresses and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "attention/cached.h"
#include "bindings/program.h"
#include "bindings/tensor.h"
#include "formats/bf16_coding.h"
#include "formats/table.h"
#include "isa/float_types.h"
#include "isa/table.h"
#include "product/kernels.h"
#include "product/linear.h"
#include "product/packing.h"
#include "runtime/placement.h"
#include "runtime/pool.h"
#include "runtime/recording.h"
#include "step/routing.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// Elements that one item of an elementwise kernel works on; below that, waking a thread costs more than it helps.
constexpr int64_t kElementsPerItem = 1 << 15;

int64_t rows_per_item(int64_t row_elements) {
    return std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, row_elements));
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.kernels->isa);
    return names;
}

const Kernels& kernels(const std::string& isa) { return *instruction_set(isa).kernels; }

const AttentionKernels& attention_kernels(const std::string& isa) { return *instruction_set(isa).attention; }

const GatedKernels& gated_kernels(const std::string& isa) { return *instruction_set(isa).gated; }

// Rounds of a matrix unit's products for this format's operands, without memory, on each of `threads` threads. Returns
// the operations of all.
int64_t run_unit(const UnitKernels& unit, Format format, int64_t rounds, int threads) {
    const Operand operand = with_format(format, [](auto found) { return decltype(found)::kOperand; });
    require(operand != Operand::kFloat32, "the unit has no products for this format");
    parallel_for(threads, threads, [&](int64_t) { unit.run_rounds(operand, rounds); });
    return unit.operations_per_round(operand) * rounds * threads;
}

// --- Norms, rotation, activation ---

// delta and total: None, or both.
void rms_norm(const Kernels& table, const Tensor& x, const Tensor& delta, const Tensor& total, const Tensor& weight,
              const Tensor& out, float eps, int threads) {
    x.dense("x", kActivations);
    require(x.ndim() > 0, "x is a number; needed: rows");
    const int64_t hidden = x.shape(-1);
    weight.dense("weight", kActivations, {hidden});
    out.like("out", x);
    if (delta) {
        delta.like("delta", x);
        total.like("total", x);
    }
    const RmsNormArgs args{x.data(),
                           delta ? delta.data() : nullptr,
                           delta ? total.data() : nullptr,
                           weight.data(),
                           out.data(),
                           hidden,
                           eps,
                           x.dtype(),
                           weight.dtype()};
    parallel_ranges(hidden > 0 ? x.size() / hidden : 0, rows_per_item(hidden), threads,
                    [&](int64_t first, int64_t end) { table.rms_norm(args, first, end); });
}

void rotate(const Kernels& table, const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out,
            int threads) {
    x.rows("x", kActivations, {kAny, kAny, kAny}, 2);
    const int64_t tokens = x.shape(0), heads = x.shape(1), dim = x.shape(2);
    cos.dense("cos", kFloat32, {tokens, kAny});
    sin.like("sin", cos);
    require(2 * cos.shape(1) <= dim,
            "cos is " + cos.describe() + "; needed: at most " + std::to_string(dim / 2) + " columns");
    out.dense("out", x.kind(), {tokens, heads, dim});
    const RotateArgs args{
        x.data(), cos.data<const float>(), sin.data<const float>(), out.data(), x.stride(0), heads, dim, cos.shape(1),
        x.dtype()};
    parallel_ranges(x.size() > 0 ? tokens : 0, rows_per_item(heads * dim), threads,
                    [&](int64_t first, int64_t end) { table.rotate(args, first, end); });
}

void swiglu(const Kernels& table, const Tensor& gate, const Tensor& up, const Tensor& out, float alpha, float offset,
            float limit, bool is_gelu, bool limits_last, int threads) {
    gate.dense("gate", kActivations);
    up.like("up", gate);
    out.like("out", gate);
    const SwigluArgs args{
        gate.data(), up.data(), out.data(), gate.dtype(), {alpha, offset, limit, is_gelu, limits_last}};
    parallel_ranges(gate.size(), kElementsPerItem, threads,
                    [&](int64_t first, int64_t end) { table.swiglu(args, first, end); });
}

// --- Weights in panels ---

// weight: as PackArgs has it; columns cannot be told from its shape where two of them share a byte. block: rows and
// columns that share a scale.
std::shared_ptr<PackedMatrix> pack(const Kernels& kernels, Format format, int64_t columns, const Tensor& weight,
                                   const Tensor& scale, DType scale_dtype, std::pair<int64_t, int64_t> block,
                                   const Tensor& zero, const Tensor& offset, Offset offset_kind,
                                   const Tensor& part_scale, const Tensor& part_minimum, const Tensor& table,
                                   const Tensor& order, bool quantizes, bool codes, const Tensor& books) {
    weight.dense("weight", kAnyKind, {kAny, kAny});
    const int64_t rows = weight.shape(0), row_bits = weight.shape(1) * weight.item_bits();
    struct Has {
        int64_t bits, part, unit;
        bool scale, zero, offset, order, minimum, table, books;
    };
    const Has has = with_format(format, [](auto found) {
        using F = decltype(found);
        return Has{F::kIsBytes ? 8 : F::kBits,
                   F::kPart,
                   F::kColumns,
                   F::kHasScale,
                   F::kTakesZero,
                   F::kTakesOffset,
                   F::kTakesOrder,
                   F::kPart > 0 && F::kTakesOffset,
                   F::kIsTable,
                   F::kIsCodebooks};
    });
    require(has.books == static_cast<bool>(books), "codebooks that the format does not have, or none that it has");
    BookSizes sizes;
    if (books) {
        books.dense("books", kFloats, {kAny, kAny, kAny});
        sizes = {books.shape(0), books.shape(1), books.shape(2), books.dtype()};
        check_books(sizes, columns);
        require(rows > 0 && row_bits == columns / sizes.inputs * sizes.number * sizes.code_bytes() * 8,
                "weight is " + weight.describe() + "; needed: codes of " + std::to_string(sizes.code_bytes()) +
                    " bytes for vectors of " + books.describe());
        require(block.first == 1 && block.second >= columns, "a row of this format has one scale");
    } else {
        require(rows > 0 && columns > 0 && row_bits == (columns * has.bits + 7) / 8 * 8,
                "weight is " + weight.describe() + "; needed: rows of " + std::to_string(columns) + " values of " +
                    std::to_string(has.bits) + " bits");
    }
    require(has.scale == static_cast<bool>(scale) && (has.zero || !zero) && (has.order || !order) &&
                (has.offset || !offset) && static_cast<bool>(offset) == (offset_kind != Offset::kNone) &&
                (!zero || !offset) && (has.part > 0) == static_cast<bool>(part_scale) &&
                has.minimum == static_cast<bool>(part_minimum) && (!has.minimum || offset_kind == Offset::kMinimum) &&
                has.table == static_cast<bool>(table),
            "a scale, a zero, an offset, a table or an order that the format does not have, or not what it has");
    PackArgs args{};
    args.format = format;
    args.rows = rows;
    args.columns = columns;
    args.weight = weight.data();
    args.scale_dtype = scale_dtype;
    args.scale_rows = args.scale_columns = 1;
    args.block_rows = block.first;
    args.block_columns = block.second;
    args.offset_kind = offset_kind;
    args.quantizes = quantizes;
    args.codes = codes;
    args.kernels = &kernels;
    if (books) args.books = books.data();
    args.book_sizes = sizes;
    if (scale) {
        const auto [block_rows, block_columns] = block;
        require(block_rows > 0 && block_columns > 0, "block has a size below 1");
        scale.dense("scale", kFloats | kUint8, {kAny, kAny});
        require(scale.item_bits() == 8 * dtype_bytes(scale_dtype),
                "scale is " + scale.describe() + ", which is not of its type");
        args.scale = scale.data();
        args.scale_rows = scale.shape(0);
        args.scale_columns = scale.shape(1);
        const int64_t grid_rows = (rows + block_rows - 1) / block_rows;
        const int64_t grid_columns = (columns + block_columns - 1) / block_columns;
        require((args.scale_rows == 1 || args.scale_rows == grid_rows) &&
                    (args.scale_columns == 1 || args.scale_columns == grid_columns),
                "scale is " + scale.describe() + "; needed: (" + std::to_string(grid_rows) + ", " +
                    std::to_string(grid_columns) + ") for blocks of (" + std::to_string(block_rows) + ", " +
                    std::to_string(block_columns) + ")");
        require((!offset && !part_scale && !table) || block_rows == 1, "a scale of this format belongs to one row");
    }
    if (zero) args.zero = zero.dense("zero", kUint8, {rows, args.scale_columns}).data<const uint8_t>();
    if (offset) args.offset = offset.dense("offset", scale.kind(), {rows, args.scale_columns}).data();
    if (part_scale) {
        require(columns % has.unit == 0 && args.scale_columns == columns / has.unit,
                "groups of this format have " + std::to_string(has.unit) + " inputs");
        const int64_t parts = columns / has.part;
        args.part_scale = part_scale.dense("part_scale", kInt8, {rows, parts}).data<const int8_t>();
        if (part_minimum) {
            args.part_minimum = part_minimum.dense("part_minimum", kInt8, {rows, parts}).data<const int8_t>();
        }
    }
    if (table) args.table = table.dense("table", kFloat32, {18}).data<const float>();
    if (order) args.order = order.dense("order", kInt32, {columns}).data<const int32_t>();
    return PackedMatrix::pack(args);
}

// The memory is kept alive by what is returned.
std::shared_ptr<PackedMatrix> view(Format format, int64_t rows, int64_t columns, const Tensor& memory,
                                   DType scale_dtype, int64_t num_groups, int64_t group, int scale_lanes, bool has_zero,
                                   Offset offset_kind, const Tensor& order, bool quantizes,
                                   std::tuple<int64_t, int64_t, int64_t> books, DType book_dtype) {
    memory.dense("memory", kUint8, {kAny});
    const auto* permutation = order ? order.dense("order", kInt32, {columns}).data<const int32_t>() : nullptr;
    const BookSizes sizes{std::get<0>(books), std::get<1>(books), std::get<2>(books), book_dtype};
    return PackedMatrix::view({format, rows, columns, memory.data<const uint8_t>(), memory.size(), scale_dtype,
                               num_groups, group, scale_lanes, has_zero, offset_kind, permutation, quantizes, sizes});
}

using ByteArray = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>, nb::device::cpu>;

// The matrix's bytes as a tensor that keeps it alive.
ByteArray memory(nb::handle self) {
    const auto& packed = nb::cast<const PackedMatrix&>(self);
    return ByteArray(const_cast<uint8_t*>(packed.memory()), {static_cast<size_t>(packed.nbytes())}, self);
}

void unpack_matrix(const Kernels& table, const PackedMatrix& weight, const Tensor& out, int threads) {
    out.dense("out", kFloat32, {weight.matrix().rows, weight.matrix().columns});
    unpack(table, weight.matrix(), out.data<float>(), threads);
}

void embedding_rows(const Kernels& table, const PackedMatrix& weight, const Tensor& row_ids, const Tensor& out,
                    int threads) {
    row_ids.dense("row_ids", kInt64);
    out.dense("out", kActivations);
    const int64_t count = row_ids.size(), columns = weight.matrix().columns;
    require(out.ndim() > 0 && out.shape(-1) == columns && out.size() == count * columns,
            "out is " + out.describe() + "; needed: " + std::to_string(count) + " rows of " + std::to_string(columns));
    embedding(table, weight.matrix(), row_ids.data<const int64_t>(), count, out.data(), out.dtype(), threads);
}

// Weight, bias or None, where the product goes.
using OutputTuple = std::tuple<MatrixPointer, Tensor, Tensor>;

void linear_rows(const Kernels& table, const Tensor& x, const std::vector<OutputTuple>& outputs, int threads) {
    x.dense("x", kActivations, {kAny, kAny});
    const int64_t rows = x.shape(0);
    std::vector<Projection> projections;
    DType out_dtype = x.dtype();
    for (const auto& [weight, bias, out] : outputs) {
        require(weight != nullptr, "a weight is not in panels");
        const Matrix& matrix = weight->matrix();
        x.dense("x", kActivations, {rows, matrix.columns});
        out.dense("out", kActivations, {rows, matrix.rows});
        if (bias) bias.dense("bias", kFloats, {matrix.rows});
        require(projections.empty() || out.dtype() == out_dtype, "out is of another type than the first one");
        out_dtype = out.dtype();
        projections.push_back(
            {&matrix, {bias ? bias.data() : nullptr, bias ? bias.dtype() : DType::kFloat32}, out.data()});
    }
    if (rows > 0) linear({&table, threads}, {x.data(), x.dtype(), rows, out_dtype}, projections);
}

void route_tokens(const Kernels& table, const PackedMatrix& weight, const Tensor& x, bool normalises, float sum_eps,
                  const Tensor& ids, const Tensor& gate_weights, int threads) {
    const Matrix& matrix = weight.matrix();
    x.dense("x", kActivations, {kAny, matrix.columns});
    const int64_t rows = x.shape(0);
    ids.dense("ids", kInt64, {rows, kAny});
    const int64_t k = ids.shape(1);
    gate_weights.dense("gate_weights", kFloat32, {rows, k});
    require(k >= 1 && k <= matrix.rows,
            "ids is " + ids.describe() + "; needed: 1 to " + std::to_string(matrix.rows) + " experts for each row");
    if (rows == 0) return;
    route({&table, threads}, {{x.data(), x.dtype(), rows, x.dtype()},
                              &matrix,
                              {nullptr, DType::kFloat32},
                              {Scoring::kSoftmax, k, nullptr, 1, 1, normalises, sum_eps, 1.0f, 0.0f},
                              ids.data<int64_t>(),
                              gate_weights.data<float>()});
}

void moe_layer(const Kernels& table, const Experts& experts, const Tensor& x, const Tensor& expert_ids,
               const Tensor& gate_weights, const Tensor& out, float alpha, float offset, float limit, bool is_gelu,
               bool limits_last, int threads) {
    require(!experts.experts.empty(), "a mixture of no experts");
    x.dense("x", kActivations, {kAny, experts.experts.front().gate->matrix().columns});
    const int64_t tokens = x.shape(0);
    expert_ids.dense("expert_ids", kInt64, {tokens, kAny});
    const int64_t k = expert_ids.shape(1);
    require(k >= 1, "expert_ids is " + expert_ids.describe() + "; needed: at least one expert for each row");
    gate_weights.dense("gate_weights", kFloat32, {tokens, k});
    out.like("out", x);
    if (tokens == 0) return;
    moe({&table, threads}, {{&experts.experts,
                             x.data(),
                             x.dtype(),
                             tokens,
                             expert_ids.data<const int64_t>(),
                             k,
                             {alpha, offset, limit, is_gelu, limits_last}},
                            gate_weights.data<const float>(),
                            out.data()});
}

void outputs_of_experts(const Kernels& table, const Experts& experts, const Tensor& x, const Tensor& expert_ids,
                        const Tensor& out, float alpha, float offset, float limit, bool is_gelu, bool limits_last,
                        int threads) {
    require(!experts.experts.empty(), "a mixture of no experts");
    const int64_t hidden = experts.experts.front().gate->matrix().columns;
    x.dense("x", kActivations, {kAny, hidden});
    const int64_t tokens = x.shape(0);
    expert_ids.dense("expert_ids", kInt64, {tokens, kAny});
    const int64_t k = expert_ids.shape(1);
    out.dense("out", kFloat32, {tokens, k, hidden});
    if (tokens == 0 || k == 0) return;
    expert_outputs({&table, threads},
                   {&experts.experts,
                    x.data(),
                    x.dtype(),
                    tokens,
                    expert_ids.data<const int64_t>(),
                    k,
                    {alpha, offset, limit, is_gelu, limits_last}},
                   out.data<float>());
}

void sum_of_outputs(const Kernels& table, const Tensor& outputs, const Tensor& expert_ids, const Tensor& gate_weights,
                    const Tensor& out, int threads) {
    outputs.dense("outputs", kFloat32, {kAny, kAny, kAny});
    const int64_t tokens = outputs.shape(0), k = outputs.shape(1), hidden = outputs.shape(2);
    expert_ids.dense("expert_ids", kInt64, {tokens, k});
    gate_weights.dense("gate_weights", kFloat32, {tokens, k});
    out.dense("out", kActivations, {tokens, hidden});
    require(k >= 1, "outputs is " + outputs.describe() + "; needed: at least one expert for each row");
    if (tokens == 0 || hidden == 0) return;
    weighted_sum({&table, threads}, outputs.data<const float>(), expert_ids.data<const int64_t>(),
                 gate_weights.data<const float>(), tokens, k, hidden, out.data(), out.dtype());
}

// --- Attention ---

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

// --- Choosing tokens ---

// top_k (0: no limit), temperature, top_p, min_p; seed; place.
using DrawTuple = std::tuple<std::tuple<int64_t, double, double, double>, uint64_t, uint64_t>;

std::vector<int64_t> draw_tokens(const Kernels& kernels, const Tensor& logits, const std::vector<DrawTuple>& rows,
                                 int threads) {
    logits.dense("logits", kFloat32, {static_cast<int64_t>(rows.size()), kAny});
    const int64_t vocabulary = logits.shape(1);
    require(vocabulary > 0, "logits is " + logits.describe() + "; needed: a vocabulary");
    std::vector<DrawParams> params;
    for (const auto& [how, seed, index] : rows) {
        const auto& [top_k, temperature, top_p, min_p] = how;
        require(top_k >= 0, "top_k is " + std::to_string(top_k) + "; needed: at least 0");
        const int64_t limit = top_k == 0 ? vocabulary : std::min(top_k, vocabulary);
        params.push_back({limit, temperature, top_p, min_p, seed, index});
    }
    std::vector<int64_t> tokens(rows.size());
    draw(kernels, logits.data<const float>(), vocabulary, params, tokens.data(), threads);
    return tokens;
}

// --- A step in one call ---

// Slots: where the state before the step is, if there is one; where the one after it goes; and others after so many
// tokens.
using StateSlotsTuple = std::tuple<std::optional<int64_t>, int64_t, std::vector<std::pair<int64_t, int64_t>>>;
// Token ids, first position, block ids, how many of the last tokens' logits are wanted, slots of states.
using SequenceTuple =
    std::tuple<std::vector<int64_t>, int64_t, std::vector<int64_t>, int64_t, std::optional<StateSlotsTuple>>;

// Buffers start at these bytes of `arena`. expert_ids and gate_weights: [routes, tokens, k].
void run(const ProgramBuilder& self, size_t first, size_t end, const Kernels& kernels,
         const AttentionKernels& attention, const GatedKernels& gated, const Memory& memory,
         const std::vector<SequenceTuple>& sequences, DType dtype, const Tensor& arena,
         const std::vector<int64_t>& starts, const Tensor& expert_ids, const Tensor& gate_weights, const Tensor& logits,
         const AttentionPlan* chosen, int threads) {
    require(first <= end && end <= self.num_instructions() && starts.size() == self.widths.size(),
            "instructions or buffers that there are not");
    self.check_memory(memory);
    StepArgs args{{}, dtype, {}, nullptr, nullptr, nullptr, 0};
    int64_t tokens = 0;
    for (const auto& [token_ids, position, block_ids, wanted, state] : sequences) {
        args.sequences.push_back({token_ids, position, block_ids, wanted, {}});
        if (state) {
            const auto& [source, target, saves] = *state;
            require(source.value_or(0) >= 0, "a state in slot " + std::to_string(source.value_or(0)));
            args.sequences.back().state = StateSlots{source.value_or(-1), target, saves};
        }
        tokens += static_cast<int64_t>(token_ids.size());
    }
    arena.dense("arena", kUint8, {kAny});
    for (size_t i = 0; i < starts.size(); ++i) {
        const int64_t item = self.program.is_wide[i] || dtype == DType::kFloat32 ? 4 : 2;
        char* buffer = arena.data<char>() + starts[i];
        require(starts[i] >= 0 && starts[i] + tokens * self.widths[i] * item <= arena.size() &&
                    reinterpret_cast<uintptr_t>(buffer) % kLineBytes == 0,
                "a buffer that the arena does not hold");
        args.buffers.push_back(buffer);
    }
    const int64_t k = self.program.num_active;
    expert_ids.dense("expert_ids", kInt64, {kAny, tokens, k});
    gate_weights.dense("gate_weights", kFloat32, {expert_ids.shape(0), tokens, k});
    require(expert_ids.shape(0) >= self.num_routes,
            "expert_ids is " + expert_ids.describe() + "; needed: " + std::to_string(self.num_routes) + " routes");
    logits.dense("logits", kFloat32, {kAny, self.vocabulary > 0 ? self.vocabulary : kAny});
    args.expert_ids = expert_ids.data<int64_t>();
    args.gate_weights = gate_weights.data<float>();
    args.logits = logits.data<float>();
    args.num_logits = logits.shape(0);
    args.chosen = chosen;
    bind_caller();
    run_step(kernels, attention, gated, self.program, memory.step, args, first, end, threads);
}

// Nodes by id, with their processors.
void place(Placement placement, const std::vector<std::pair<int, std::vector<int>>>& nodes) {
    std::vector<Node> found;
    for (const auto& [id, processors] : nodes) found.push_back({id, processors});
    place_weights(placement, found);
}

// --- What a step is made of, for a simulation ---

// Kernel, and of each item: bytes, operations in int8, bfloat16 and float32, elements.
using ItemTuple = std::tuple<double, double, double, double, double>;
using PhaseTuple = std::pair<std::string, std::vector<ItemTuple>>;

// What the calls of run_parallel within `work` consist of.
std::vector<PhaseTuple> record(const nb::callable& work) {
    Recording recording;
    work();
    std::vector<PhaseTuple> phases;
    for (const Phase& phase : recording.phases) {
        phases.emplace_back(phase.kernel, std::vector<ItemTuple>());
        for (const Cost& cost : phase.items) {
            phases.back().second.emplace_back(cost.bytes, cost.int8_operations, cost.bfloat16_operations,
                                              cost.float32_operations, cost.elements);
        }
    }
    return phases;
}

// --- Read bandwidth, for benchmarks: every byte once, as fast as a plain loop can ---

uint64_t sum_words(const std::vector<std::pair<const uint8_t*, int64_t>>& pieces, int threads) {
    std::atomic<uint64_t> total{0};
    parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
        const auto& [data, bytes] = pieces[static_cast<size_t>(i)];
        const auto* words = reinterpret_cast<const uint64_t*>(data);
        uint64_t sums[8] = {};
        for (int64_t line = 0; line < bytes / kLineBytes; ++line, words += 8) {
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; ++lane) sums[lane] += words[lane];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

void add_pieces(const uint8_t* data, int64_t bytes, std::vector<std::pair<const uint8_t*, int64_t>>& pieces) {
    constexpr int64_t kPieceBytes = 1 << 18;
    for (int64_t at = 0; at < bytes; at += kPieceBytes) {
        pieces.emplace_back(data + at, std::min(kPieceBytes, bytes - at));
    }
}

uint64_t checksum(const std::vector<MatrixPointer>& weights, int threads) {
    std::vector<std::pair<const uint8_t*, int64_t>> pieces;
    for (const auto& weight : weights) {
        require(weight != nullptr, "a weight is not in panels");
        add_pieces(weight->memory(), weight->nbytes(), pieces);
    }
    return sum_words(pieces, threads);
}

uint64_t read_memory(const Tensor& memory, int threads) {
    memory.dense("memory", kAnyKind);
    std::vector<std::pair<const uint8_t*, int64_t>> pieces;
    add_pieces(memory.data<const uint8_t>(), memory.size() * memory.item_bits() / 8, pieces);
    return sum_words(pieces, threads);
}

template <class... F>
void bind_formats(nb::module_& module, FormatList<F...>) {
    nb::enum_<Format> formats(module, "Format");
    (formats.value(F::kName, kFormat<F>), ...);
}

}  // namespace
}  // namespace amalgam

// Arguments go by position where calls are made in every layer of every step: matching names costs time.
NB_MODULE(_native, module) {
    // A process that ends with its weights in memory is not at fault.
    nanobind::set_leak_warnings(false);
    using namespace nb::literals;
    using namespace amalgam;
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    const auto optional = [] { return nb::arg().none(); };
    nb::enum_<DType>(module, "DType")
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBfloat16)
        .value("float16", DType::kFloat16)
        .value("float8_e4m3fn", DType::kFp8)
        .value("float8_e8m0fnu", DType::kE8m0);
    nb::enum_<Offset>(module, "Offset")
        .value("none", Offset::kNone)
        .value("zero", Offset::kZero)
        .value("minimum", Offset::kMinimum);
    bind_formats(module, Formats{});
    nb::class_<PackedMatrix>(module, "Matrix")
        .def_prop_ro("memory", &memory)
        .def_prop_ro("format", [](const PackedMatrix& packed) { return packed.matrix().format; })
        .def_prop_ro("scale_lanes", [](const PackedMatrix& packed) { return packed.matrix().scale_lanes; })
        .def_prop_ro("begins", [](const PackedMatrix& packed) {
            const MemoryLayout& at = packed.layout();
            return std::make_tuple(at.scale, at.zero, at.offset, at.parts, at.table, at.nbytes);
        });
    nb::class_<Experts>(module, "Experts")
        .def(nb::init<>())
        .def("add", &Experts::add, nb::arg(), nb::arg(), nb::arg(), optional(), optional(), optional());
    nb::class_<UnitKernels>(module, "MatrixUnit")
        .def_prop_rw(
            "int8_rows", [](const UnitKernels& unit) { return *unit.int8_rows; },
            [](const UnitKernels& unit, int64_t rows) { *unit.int8_rows = rows; })
        .def_prop_rw(
            "scales_weights", [](const UnitKernels& unit) { return *unit.scales_weights; },
            [](const UnitKernels& unit, bool scales) { *unit.scales_weights = scales; })
        .def("run", &run_unit, Unlocked());
    nb::class_<Kernels>(module, "Kernels")
        .def_prop_ro("isa", [](const Kernels& table) { return table.isa; })
        .def_prop_ro(
            "unit", [](const Kernels& table) { return table.unit; }, nb::rv_policy::reference)
        .def("rms_norm", &amalgam::rms_norm, nb::arg(), optional(), optional(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), Unlocked())
        .def("rotate", &amalgam::rotate, Unlocked())
        .def("swiglu", &amalgam::swiglu, Unlocked())
        .def("unpack", &unpack_matrix, Unlocked())
        .def("embedding", &embedding_rows, Unlocked())
        .def("linear", &linear_rows, Unlocked())
        .def("route", &route_tokens, Unlocked())
        .def("moe", &moe_layer, Unlocked())
        .def("expert_outputs", &outputs_of_experts, Unlocked())
        .def("weighted_sum", &sum_of_outputs, Unlocked());
    module.def("pack", &pack, "kernels"_a, "format"_a, "columns"_a, "weight"_a, "scale"_a.none(), "scale_dtype"_a,
               "block"_a, "zero"_a.none(), "offset"_a.none(), "offset_kind"_a, "part_scale"_a.none(),
               "part_minimum"_a.none(), "table"_a.none(), "order"_a.none(), "quantizes"_a, "codes"_a,
               "books"_a.none() = nb::none(), Unlocked());
    module.def("view", &view, "format"_a, "rows"_a, "columns"_a, "memory"_a, "scale_dtype"_a, "num_groups"_a, "group"_a,
               "scale_lanes"_a, "has_zero"_a, "offset_kind"_a, "order"_a.none(), "quantizes"_a,
               "books"_a = std::make_tuple(int64_t{0}, int64_t{0}, int64_t{0}), "book_dtype"_a = DType::kFloat32,
               nb::keep_alive<0, 4>());
    module.def("most_coded_bytes", &most_coded_bytes, "rows"_a, "columns"_a);
    module.attr("layout_version") = kLayoutVersion;
    module.def("draw", &draw_tokens, Unlocked());
    nb::enum_<Placement>(module, "Placement")
        .value("anywhere", Placement::kAnywhere)
        .value("interleaved", Placement::kInterleaved)
        .value("local", Placement::kLocal);
    module.def("place_weights", &place, "placement"_a, "nodes"_a);
    module.def("bind_threads", &bind_threads, "processors"_a);
    module.def("limit_threads", &limit_threads, "most"_a);
    module.def("record", &record, "work"_a);
    module.def("checksum", &checksum, Unlocked());
    module.def("read_memory", &read_memory, Unlocked());
    module.def("supported_isas", &supported_isas);
    module.def("kernels", &kernels, "isa"_a, nb::rv_policy::reference);
    module.def("attention_kernels", &attention_kernels, "isa"_a, nb::rv_policy::reference);
    module.def("gated_kernels", &gated_kernels, "isa"_a, nb::rv_policy::reference);
    nb::class_<GatedKernels>(module, "GatedKernels").def_prop_ro("isa", [](const GatedKernels& table) {
        return table.isa;
    });
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
    nb::enum_<Scoring>(module, "Scoring")
        .value("softmax", Scoring::kSoftmax)
        .value("sigmoid", Scoring::kSigmoid)
        .value("chosen", Scoring::kChosen)
        .value("apart", Scoring::kApart)
        .value("mixer", Scoring::kMixer);
    nb::enum_<ElementwiseKind>(module, "Elementwise")
        .value("add", ElementwiseKind::kAdd)
        .value("clamp", ElementwiseKind::kClamp)
        .value("gelu", ElementwiseKind::kGelu)
        .value("scale", ElementwiseKind::kScale)
        .value("softcap", ElementwiseKind::kSoftcap);
    using Buffers = std::vector<std::tuple<int64_t, bool>>;
    using Caches = std::vector<std::pair<CacheTuple, CacheTuple>>;
    using Ropes = std::vector<std::pair<Tensor, Tensor>>;
    using States = std::vector<std::optional<StateTuple>>;
    using Indexes = std::vector<std::optional<CacheTuple>>;
    nb::class_<Memory>(module, "StepMemory")
        .def(nb::init<const Caches&, int64_t, const Ropes&, int64_t, const States&, const Indexes&>());
    nb::class_<ProgramBuilder>(module, "Program")
        .def(nb::init<const Buffers&, int64_t>())
        .def_prop_ro("num_instructions", &ProgramBuilder::num_instructions)
        .def("add_embed", &ProgramBuilder::add_embed, optional(), optional(), nb::arg(), nb::arg(), nb::arg())
        .def("add_normalize", &ProgramBuilder::add_normalize, nb::arg(), nb::arg(), optional(), optional(), nb::arg(),
             nb::arg(), nb::arg())
        .def("add_project", &ProgramBuilder::add_project)
        .def("add_attend", &ProgramBuilder::add_attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             optional(), optional(), nb::arg(), nb::arg(), optional(), optional(), nb::arg(), optional(), nb::arg(),
             nb::arg(), nb::arg(), optional())
        .def("add_attend_latent", &ProgramBuilder::add_attend_latent)
        .def("add_keep_index_key", &ProgramBuilder::add_keep_index_key)
        .def("add_route", &ProgramBuilder::add_route, nb::arg(), nb::arg(), optional(), optional(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional() = nb::none())
        .def("add_mix", &ProgramBuilder::add_mix, nb::keep_alive<1, 3>())
        .def("add_weigh_input", &ProgramBuilder::add_weigh_input)
        .def("add_swiglu", &ProgramBuilder::add_swiglu)
        .def("add_elementwise", &ProgramBuilder::add_elementwise, nb::arg(), nb::arg(), optional(), nb::arg())
        .def("add_scale", &ProgramBuilder::add_scale)
        .def("add_scale_heads", &ProgramBuilder::add_scale_heads)
        .def("add_scale_by_position", &ProgramBuilder::add_scale_by_position)
        .def("add_gate", &ProgramBuilder::add_gate)
        .def("add_split", &ProgramBuilder::add_split)
        .def("add_convolve", &ProgramBuilder::add_convolve, nb::arg(), nb::arg(), optional(), optional(), optional(),
             nb::arg(), nb::arg(), nb::arg())
        .def("add_delta_rule", &ProgramBuilder::add_delta_rule)
        .def("add_state_space", &ProgramBuilder::add_state_space)
        .def("add_head", &ProgramBuilder::add_head, nb::arg(), nb::arg(), optional(), nb::arg(), optional())
        .def("run", &run, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional(), nb::arg(), Unlocked());
}
