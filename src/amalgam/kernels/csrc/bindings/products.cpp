// Products with weights in panels, and what else is read of them.
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "product/linear.h"
#include "product/packing.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

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

}  // namespace

void bind_products(KernelsClass& kernels) {
    kernels.def("unpack", &unpack_matrix, Unlocked())
        .def("embedding", &embedding_rows, Unlocked())
        .def("linear", &linear_rows, Unlocked());
}

}  // namespace amalgam
