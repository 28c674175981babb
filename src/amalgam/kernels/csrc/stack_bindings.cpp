// Exposes decoder layers in one call to Python; called by bindings.cpp. amalgam/kernels/stack.py checks types and
// shapes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "experts.h"
#include "stack.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

using WeightTuple = std::tuple<std::shared_ptr<PackedMatrix>, uintptr_t, DType>;  // with its bias
using NormTuple = std::tuple<uintptr_t, DType>;

struct Stack {
    std::vector<StackLayer> layers;
};

Weight weight(const WeightTuple& tuple) {
    const auto& [matrix, bias, dtype] = tuple;
    if (!matrix) throw std::invalid_argument("a weight is not in panels");
    return {matrix, {reinterpret_cast<const void*>(bias), dtype}};
}

NormWeight norm(const NormTuple& tuple) {
    return {reinterpret_cast<const void*>(std::get<0>(tuple)), std::get<1>(tuple)};
}

// projections: query, key, value, out; norms: of query and key heads, before the MLP, after the layer.
void begin_layer(Stack& stack, const std::vector<WeightTuple>& projections, const std::vector<NormTuple>& norms,
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
    stack.layers.push_back(layer);
}

void set_dense(Stack& stack, const WeightTuple& gate, const WeightTuple& up, const WeightTuple& down) {
    StackLayer& layer = stack.layers.back();
    layer.gate = weight(gate);
    layer.up = weight(up);
    layer.down = weight(down);
}

void set_mixture(Stack& stack, std::shared_ptr<PackedMatrix> router, int64_t num_active, bool normalises, float sum_eps,
                 const Experts& experts, float alpha, float offset, float limit) {
    StackLayer& layer = stack.layers.back();
    layer.router = std::move(router);
    layer.num_active = num_active;
    layer.normalises = normalises;
    layer.sum_eps = sum_eps;
    layer.experts = &experts.experts;
    layer.gating = {alpha, offset, limit};
}

// ropes: cos, sin and half of each; caches: keys and values of each layer.
void run(const Stack& stack, const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
         uintptr_t x, uintptr_t normed, DType dtype, int64_t hidden, uintptr_t positions, int64_t num_positions,
         const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& ropes,
         const std::vector<std::tuple<uintptr_t, uintptr_t>>& caches, uintptr_t slot_ids, int64_t num_slots,
         uintptr_t expert_ids, uintptr_t gate_weights, int threads) {
    StackArgs args{};
    args.x = reinterpret_cast<void*>(x);
    args.normed = reinterpret_cast<void*>(normed);
    args.dtype = dtype;
    args.hidden = hidden;
    args.positions = reinterpret_cast<const int64_t*>(positions);
    args.num_positions = num_positions;
    for (const auto& [cos, sin, half] : ropes) {
        args.cos.push_back(reinterpret_cast<const float*>(cos));
        args.sin.push_back(reinterpret_cast<const float*>(sin));
        args.half.push_back(half);
    }
    for (const auto& [keys, values] : caches) {
        args.keys.push_back(reinterpret_cast<void*>(keys));
        args.values.push_back(reinterpret_cast<void*>(values));
    }
    args.slot_ids = reinterpret_cast<const int64_t*>(slot_ids);
    args.num_slots = num_slots;
    args.expert_ids = reinterpret_cast<int64_t*>(expert_ids);
    args.gate_weights = reinterpret_cast<float*>(gate_weights);
    run_stack(kernels, attention, plan, stack.layers, args, threads);
}

}  // namespace

void bind_stack(nb::module_& module) {
    nb::class_<Stack>(module, "Stack")
        .def(nb::init<>())
        .def("begin_layer", &begin_layer)
        .def("set_dense", &set_dense)
        .def("set_mixture", &set_mixture, nb::keep_alive<1, 6>())
        .def("run", &run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace amalgam
