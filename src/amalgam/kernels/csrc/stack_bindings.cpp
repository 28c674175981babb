// Exposes a standard model in one call to Python; called by bindings.cpp. amalgam/kernels/stack.py checks types and
// shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "experts.h"
#include "stack.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

using WeightTuple = std::tuple<std::shared_ptr<PackedMatrix>, uintptr_t, DType>;  // with its bias
using NormTuple = std::tuple<uintptr_t, DType>;

using CacheTuple = std::tuple<uintptr_t, uintptr_t>;          // keys and values of a layer
using RopeTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;  // cos, sin and half
// Token ids, first position, block ids, how many of the last tokens' logits are wanted.
using SequenceTuple = std::tuple<std::vector<int64_t>, int64_t, std::vector<int64_t>, int64_t>;

Weight weight(const WeightTuple& tuple) {
    const auto& [matrix, bias, dtype] = tuple;
    if (!matrix) throw std::invalid_argument("a weight is not in panels");
    return {matrix, {reinterpret_cast<const void*>(bias), dtype}};
}

NormWeight norm(const NormTuple& tuple) {
    return {reinterpret_cast<const void*>(std::get<0>(tuple)), std::get<1>(tuple)};
}

// projections: query, key, value, out; norms: of query and key heads, before the MLP, after the layer.
void begin_layer(StackModel& model, const std::vector<WeightTuple>& projections, const std::vector<NormTuple>& norms,
                 float head_norm_eps, float norm_eps, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
                 int64_t window, uintptr_t sinks, int64_t rope) {
    StackLayer layer{};
    layer.query = weight(projections.at(0));
    layer.key = weight(projections.at(1));
    layer.value = weight(projections.at(2));
    layer.out = weight(projections.at(3));
    layer.query_norm = norm(norms.at(0));
    layer.key_norm = norm(norms.at(1));
    layer.mlp_norm = norm(norms.at(2));
    layer.next_norm = norm(norms.at(3));
    layer.head_norm_eps = head_norm_eps;
    layer.norm_eps = norm_eps;
    layer.heads = heads;
    layer.kv_heads = kv_heads;
    layer.head_dim = head_dim;
    layer.scale = scale;
    layer.window = window;
    layer.sinks = reinterpret_cast<const float*>(sinks);
    layer.rope = rope;
    model.layers.push_back(layer);
}

void set_dense(StackModel& model, const WeightTuple& gate, const WeightTuple& up, const WeightTuple& down) {
    StackLayer& layer = model.layers.back();
    layer.gate = weight(gate);
    layer.up = weight(up);
    layer.down = weight(down);
}

void set_mixture(StackModel& model, std::shared_ptr<PackedMatrix> router, int64_t num_active, bool normalises,
                 float sum_eps, const Experts& experts, float alpha, float offset, float limit) {
    StackLayer& layer = model.layers.back();
    layer.router = std::move(router);
    layer.num_active = num_active;
    layer.normalises = normalises;
    layer.sum_eps = sum_eps;
    layer.experts = &experts.experts;
    layer.gating = {alpha, offset, limit};
}

// embedding: in panels, or else rows of a type; none of them: steps bring their rows. head: none: see StackModel.
void make_model(StackModel* self, int64_t hidden, std::shared_ptr<PackedMatrix> embedding, uintptr_t rows, DType dtype,
                int64_t num_rows, const NormTuple& first_norm, float norm_eps, const std::optional<WeightTuple>& head) {
    new (self) StackModel{hidden,
                          {std::move(embedding), reinterpret_cast<const void*>(rows), dtype, num_rows},
                          norm(first_norm),
                          norm_eps,
                          {},
                          head ? weight(*head) : Weight{}};
}

void make_memory(StackMemory* self, const std::vector<CacheTuple>& caches, int64_t num_slots, int64_t block_size,
                 const std::vector<RopeTuple>& ropes, int64_t num_positions) {
    new (self) StackMemory{};
    for (const auto& [keys, values] : caches) {
        self->keys.push_back(reinterpret_cast<void*>(keys));
        self->values.push_back(reinterpret_cast<void*>(values));
    }
    self->num_slots = num_slots;
    self->block_size = block_size;
    for (const auto& [cos, sin, half] : ropes) {
        self->cos.push_back(reinterpret_cast<const float*>(cos));
        self->sin.push_back(reinterpret_cast<const float*>(sin));
        self->half.push_back(half);
    }
    self->num_positions = num_positions;
}

void run(const StackModel& model, const Kernels& kernels, const AttentionKernels& attention, const StackMemory& memory,
         const std::vector<SequenceTuple>& sequences, DType dtype, uintptr_t x, uintptr_t expert_ids,
         uintptr_t gate_weights, uintptr_t out, int64_t num_logits, int threads) {
    StackStep step{{},
                   dtype,
                   reinterpret_cast<const void*>(x),
                   reinterpret_cast<int64_t*>(expert_ids),
                   reinterpret_cast<float*>(gate_weights),
                   reinterpret_cast<void*>(out),
                   num_logits};
    for (const auto& [token_ids, position, block_ids, wanted] : sequences) {
        step.sequences.push_back({token_ids, position, block_ids, wanted});
    }
    run_stack(kernels, attention, model, memory, step, threads);
}

}  // namespace

void bind_stack(nb::module_& module) {
    nb::class_<StackMemory>(module, "StackMemory").def("__init__", &make_memory);
    nb::class_<StackModel>(module, "Stack")
        .def("__init__", &make_model, nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg().none())
        .def("begin_layer", &begin_layer)
        .def("set_dense", &set_dense)
        .def("set_mixture", &set_mixture, nb::keep_alive<1, 6>())
        .def("run", &run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace amalgam
