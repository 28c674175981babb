// Norms, rotation, activation.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "product/kernels.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// Elements that one item of an elementwise kernel works on; below that, waking a thread costs more than it helps.
constexpr int64_t kElementsPerItem = 1 << 15;

int64_t rows_per_item(int64_t row_elements) {
    return std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, row_elements));
}

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

}  // namespace

void bind_elementwise(KernelsClass& kernels) {
    kernels
        .def("rms_norm", &rms_norm, nb::arg(), optional(), optional(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             Unlocked())
        .def("rotate", &rotate, Unlocked())
        .def("swiglu", &swiglu, Unlocked());
}

}  // namespace amalgam
