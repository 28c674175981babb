// Mixtures of experts: routing, and the experts of one layer.
#include "bindings/experts.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>

#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "product/linear.h"
#include "step/routing.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

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
                              {Scoring::kSoftmax, k, nullptr, 1, 1, normalises, sum_eps, 1.0f, 0.0f, nullptr},
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

}  // namespace

void bind_experts(nb::module_& module, KernelsClass& kernels) {
    nb::class_<Experts>(module, "Experts")
        .def(nb::init<>())
        .def("add", &Experts::add, nb::arg(), nb::arg(), nb::arg(), optional(), optional(), optional());
    kernels.def("route", &route_tokens, Unlocked())
        .def("moe", &moe_layer, Unlocked())
        .def("expert_outputs", &outputs_of_experts, Unlocked())
        .def("weighted_sum", &sum_of_outputs, Unlocked());
}

}  // namespace amalgam
