// The experts of one layer as Python holds them: checked once, and kept alive.
#pragma once

#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "product/linear.h"

namespace amalgam {

struct Experts {
    std::vector<ExpertWeights> experts;
    std::vector<nanobind::object> biases;

    // All of one shape; biases are float32.
    void add(const MatrixPointer& gate, const MatrixPointer& up, const MatrixPointer& down, const Tensor& gate_bias,
             const Tensor& up_bias, const Tensor& down_bias) {
        require(gate && up && down, "an expert's weight is not in panels");
        const Matrix& first = experts.empty() ? gate->matrix() : experts.front().gate->matrix();
        const int64_t width = first.rows, hidden = first.columns;
        const auto check = [](const char* name, const Matrix& found, int64_t rows, int64_t columns) {
            require(found.rows == rows && found.columns == columns,
                    std::string(name) + " is " + std::to_string(found.rows) + " x " + std::to_string(found.columns) +
                        "; needed: " + std::to_string(rows) + " x " + std::to_string(columns));
        };
        check("gate", gate->matrix(), width, hidden);
        check("up", up->matrix(), width, hidden);
        check("down", down->matrix(), hidden, width);
        const auto bias = [&](const char* name, const Tensor& tensor, int64_t size) {
            if (!tensor) return Bias{nullptr, DType::kFloat32};
            tensor.dense(name, kFloat32, {size});
            biases.push_back(nanobind::borrow(tensor.object()));
            return Bias{tensor.data(), DType::kFloat32};
        };
        const Bias at_gate = bias("gate_bias", gate_bias, width), at_up = bias("up_bias", up_bias, width),
                   at_down = bias("down_bias", down_bias, hidden);
        experts.push_back({gate, up, down, at_gate, at_up, at_down});
    }
};

}  // namespace amalgam
