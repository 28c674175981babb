// The extension module amalgam._native: exposes the kernels of every instruction set to Python.
//
// Arrays come in as addresses; amalgam/kernels/backends/cpu has checked device, layout, type and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/experts.h"
#include "formats/bf16_coding.h"
#include "formats/table.h"
#include "isa/table.h"
#include "product/kernels.h"
#include "product/linear.h"
#include "product/packing.h"
#include "runtime/pool.h"
#include "step/routing.h"

namespace nb = nanobind;

namespace amalgam {

void bind_attention(nb::module_& module);  // attention.cpp
void bind_step(nb::module_& module);       // step.cpp

namespace {

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.kernels->isa);
    return names;
}

const Kernels& kernels(const std::string& isa) { return *instruction_set(isa).kernels; }

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Elements that one item of an elementwise kernel works on; below that, waking a thread costs more than it helps.
constexpr int64_t kElementsPerItem = 1 << 15;

int64_t rows_per_item(int64_t row_elements) { return std::max<int64_t>(1, kElementsPerItem / row_elements); }

void rms_norm(const Kernels& table, uintptr_t x, uintptr_t delta, uintptr_t sum, uintptr_t weight, uintptr_t out,
              int64_t rows, int64_t hidden, float eps, DType x_dtype, DType weight_dtype, int threads) {
    const RmsNormArgs args{pointer<const void>(x),
                           pointer<const void>(delta),
                           pointer<void>(sum),
                           pointer<const void>(weight),
                           pointer<void>(out),
                           hidden,
                           eps,
                           x_dtype,
                           weight_dtype};
    parallel_ranges(rows, rows_per_item(hidden), threads,
                    [&](int64_t first, int64_t end) { table.rms_norm(args, first, end); });
}

void rotate(const Kernels& table, uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t out, int64_t tokens,
            int64_t token_stride, int64_t heads, int64_t head_dim, int64_t half, DType dtype, int threads) {
    const RotateArgs args{pointer<const void>(x),
                          pointer<const float>(cos),
                          pointer<const float>(sin),
                          pointer<void>(out),
                          token_stride,
                          heads,
                          head_dim,
                          half,
                          dtype};
    parallel_ranges(tokens, rows_per_item(heads * head_dim), threads,
                    [&](int64_t first, int64_t end) { table.rotate(args, first, end); });
}

void swiglu(const Kernels& table, uintptr_t gate, uintptr_t up, uintptr_t out, int64_t elements, DType dtype,
            int threads) {
    const SwigluArgs args{pointer<const void>(gate), pointer<const void>(up), pointer<void>(out), dtype};
    parallel_ranges(elements, kElementsPerItem, threads,
                    [&](int64_t first, int64_t end) { table.swiglu(args, first, end); });
}

std::shared_ptr<PackedMatrix> pack(Format format, int64_t rows, int64_t columns, uintptr_t weight, uintptr_t scale,
                                   DType scale_dtype, int64_t scale_rows, int64_t scale_columns, int64_t block_rows,
                                   int64_t block_columns, uintptr_t zero, uintptr_t order, bool quantizes, bool codes) {
    return PackedMatrix::pack({format, rows, columns, pointer<const void>(weight), pointer<const void>(scale),
                               scale_dtype, scale_rows, scale_columns, block_rows, block_columns,
                               pointer<const uint8_t>(zero), pointer<const int32_t>(order), quantizes, codes});
}

template <class... F>
void bind_formats(nb::module_& module, FormatList<F...>) {
    nb::enum_<Format> formats(module, "Format");
    (formats.value(F::kName, kFormat<F>), ...);
}

// The caller keeps the memory alive.
std::shared_ptr<PackedMatrix> view(Format format, int64_t rows, int64_t columns, uintptr_t memory, int64_t nbytes,
                                   DType scale_dtype, int64_t num_groups, int64_t group, int scale_lanes, bool has_zero,
                                   uintptr_t order, bool quantizes, nb::handle /*owner*/) {
    return PackedMatrix::view({format, rows, columns, pointer<const uint8_t>(memory), nbytes, scale_dtype, num_groups,
                               group, scale_lanes, has_zero, pointer<const int32_t>(order), quantizes});
}

using Memory = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>, nb::device::cpu>;

// The matrix's bytes as a tensor that keeps it alive.
Memory memory(nb::handle self) {
    const auto& packed = nb::cast<const PackedMatrix&>(self);
    return Memory(const_cast<uint8_t*>(packed.memory()), {static_cast<size_t>(packed.nbytes())}, self);
}

void unpack_matrix(const Kernels& table, const PackedMatrix& weight, uintptr_t out, int threads) {
    unpack(table, weight.matrix(), pointer<float>(out), threads);
}

void embedding_rows(const Kernels& table, const PackedMatrix& weight, uintptr_t row_ids, int64_t num_ids, uintptr_t out,
                    DType out_dtype, int threads) {
    embedding(table, weight.matrix(), pointer<const int64_t>(row_ids), num_ids, pointer<void>(out), out_dtype, threads);
}

// Weight, bias or 0, the bias's type, where the product goes.
using Output = std::tuple<std::shared_ptr<PackedMatrix>, uintptr_t, DType, uintptr_t>;

void linear_rows(const Kernels& table, uintptr_t x, int64_t rows, DType x_dtype, const std::vector<Output>& outputs,
                 DType out_dtype, int threads) {
    std::vector<Projection> projections;
    for (const auto& [weight, bias, bias_dtype, out] : outputs) {
        if (!weight) throw std::invalid_argument("a weight is not in panels");
        projections.push_back({&weight->matrix(), {pointer<const void>(bias), bias_dtype}, pointer<void>(out)});
    }
    linear({&table, threads}, {pointer<const void>(x), x_dtype, rows, out_dtype}, projections);
}

void route_tokens(const Kernels& table, const PackedMatrix& weight, uintptr_t x, int64_t rows, DType x_dtype, int64_t k,
                  bool normalises, float sum_eps, uintptr_t ids, uintptr_t weights, int threads) {
    route({&table, threads}, {{pointer<const void>(x), x_dtype, rows, x_dtype},
                              &weight.matrix(),
                              {nullptr, DType::kFloat32},
                              {Scoring::kSoftmax, k, nullptr, 1, 1, normalises, sum_eps, 1.0f, 0.0f},
                              pointer<int64_t>(ids),
                              pointer<float>(weights)});
}

// top_k (0: no limit), temperature, top_p, min_p; seed; place.
using DrawTuple = std::tuple<std::tuple<int64_t, double, double, double>, uint64_t, uint64_t>;

std::vector<int64_t> draw_tokens(const Kernels& kernels, uintptr_t logits, int64_t vocabulary,
                                 const std::vector<DrawTuple>& rows, int threads) {
    std::vector<DrawParams> params;
    for (const auto& [how, seed, index] : rows) {
        const auto& [top_k, temperature, top_p, min_p] = how;
        if (top_k < 0) throw std::invalid_argument("top_k " + std::to_string(top_k));
        const int64_t limit = top_k == 0 ? vocabulary : std::min(top_k, vocabulary);
        params.push_back({limit, temperature, top_p, min_p, seed, index});
    }
    std::vector<int64_t> tokens(rows.size());
    draw(kernels, pointer<const float>(logits), vocabulary, params, tokens.data(), threads);
    return tokens;
}

// Reads every byte of the weights once, as fast as a plain loop can: the read bandwidth for benchmarks/kernels.py.
uint64_t checksum(const std::vector<std::shared_ptr<PackedMatrix>>& weights, int threads) {
    constexpr int64_t kBytesPerItem = 1 << 18;
    struct Item {
        const uint8_t* data;
        int64_t bytes;
    };
    std::vector<Item> items;
    for (const auto& weight : weights) {
        if (!weight) throw std::invalid_argument("a weight is not in panels");
        for (int64_t at = 0; at < weight->nbytes(); at += kBytesPerItem) {
            items.push_back({weight->memory() + at, std::min(kBytesPerItem, weight->nbytes() - at)});
        }
    }
    std::atomic<uint64_t> total{0};
    parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t i) {
        const Item& item = items[static_cast<size_t>(i)];
        const auto* words = reinterpret_cast<const uint64_t*>(item.data);
        uint64_t sums[8] = {};
        for (int64_t line = 0; line < item.bytes / kLineBytes; ++line, words += 8) {
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; ++lane) sums[lane] += words[lane];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

// Biases are float32 and kept alive by the caller; 0: none.
void add_expert(Experts& table, std::shared_ptr<PackedMatrix> gate, std::shared_ptr<PackedMatrix> up,
                std::shared_ptr<PackedMatrix> down, uintptr_t gate_bias, uintptr_t up_bias, uintptr_t down_bias) {
    const auto bias = [](uintptr_t address) { return Bias{pointer<const void>(address), DType::kFloat32}; };
    table.experts.push_back(
        {std::move(gate), std::move(up), std::move(down), bias(gate_bias), bias(up_bias), bias(down_bias)});
}

void moe_layer(const Kernels& table, const Experts& experts, uintptr_t x, uintptr_t expert_ids, uintptr_t gate_weights,
               uintptr_t out, int64_t tokens, int64_t num_active, float alpha, float offset, float limit, DType x_dtype,
               int threads) {
    moe({&table, threads}, {&experts.experts,
                            pointer<const void>(x),
                            x_dtype,
                            tokens,
                            pointer<const int64_t>(expert_ids),
                            pointer<const float>(gate_weights),
                            num_active,
                            {alpha, offset, limit},
                            pointer<void>(out)});
}

}  // namespace
}  // namespace amalgam

NB_MODULE(_native, module) {
    // A process that ends with its weights in memory is not at fault.
    nanobind::set_leak_warnings(false);
    using namespace nb::literals;
    using namespace amalgam;
    using Unlocked = nb::call_guard<nb::gil_scoped_release>;
    nb::enum_<DType>(module, "DType")
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBfloat16)
        .value("float16", DType::kFloat16);
    bind_formats(module, Formats{});
    nb::class_<PackedMatrix>(module, "Matrix")
        .def_prop_ro("memory", &memory)
        .def_prop_ro("format", [](const PackedMatrix& packed) { return packed.matrix().format; })
        .def_prop_ro("scale_lanes", [](const PackedMatrix& packed) { return packed.matrix().scale_lanes; })
        .def_prop_ro("scale_offset", &PackedMatrix::scale_offset)
        .def_prop_ro("zero_offset", &PackedMatrix::zero_offset);
    nb::class_<Experts>(module, "Experts")
        .def(nb::init<>())
        .def("add", &add_expert, "gate"_a, "up"_a, "down"_a, "gate_bias"_a, "up_bias"_a, "down_bias"_a);
    // What every layer of every step calls takes its arguments by position: matching names costs time.
    nb::class_<Kernels>(module, "Kernels")
        .def_prop_ro("isa", [](const Kernels& table) { return table.isa; })
        .def("rms_norm", &amalgam::rms_norm, Unlocked())
        .def("rotate", &amalgam::rotate, Unlocked())
        .def("swiglu", &amalgam::swiglu, "gate"_a, "up"_a, "out"_a, "elements"_a, "dtype"_a, "threads"_a, Unlocked())
        .def("unpack", &unpack_matrix, "weight"_a, "out"_a, "threads"_a, Unlocked())
        .def("embedding", &embedding_rows, "weight"_a, "row_ids"_a, "num_ids"_a, "out"_a, "out_dtype"_a, "threads"_a,
             Unlocked())
        .def("linear", &linear_rows, Unlocked())
        .def("route", &route_tokens, Unlocked())
        .def("moe", &moe_layer, Unlocked());
    module.def("pack", &pack, "format"_a, "rows"_a, "columns"_a, "weight"_a, "scale"_a, "scale_dtype"_a, "scale_rows"_a,
               "scale_columns"_a, "block_rows"_a, "block_columns"_a, "zero"_a, "order"_a, "quantizes"_a, "codes"_a,
               Unlocked());
    module.def("draw", &draw_tokens, Unlocked());
    module.def("view", &view, "format"_a, "rows"_a, "columns"_a, "memory"_a, "nbytes"_a, "scale_dtype"_a,
               "num_groups"_a, "group"_a, "scale_lanes"_a, "has_zero"_a, "order"_a, "quantizes"_a, "owner"_a,
               nb::keep_alive<0, 13>());
    module.def("most_coded_bytes", &most_coded_bytes, "rows"_a, "columns"_a);
    module.attr("layout_version") = kLayoutVersion;
    module.def("checksum", &checksum, "weights"_a, "threads"_a, Unlocked());
    module.def("supported_isas", &supported_isas);
    module.def("kernels", &kernels, "isa"_a, nb::rv_policy::reference);
    bind_attention(module);
    bind_step(module);
}
