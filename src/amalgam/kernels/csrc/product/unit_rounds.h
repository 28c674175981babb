// A matrix unit's products without memory: how fast it is, which benchmarks compare with.
#pragma once

#include "product/unit.h"

namespace amalgam {
namespace {

template <class Unit, Operand kOperand>
void add_products() {
    add_product<Unit, kOperand, 0, 4, 6>();
    add_product<Unit, kOperand, 1, 4, 7>();
    add_product<Unit, kOperand, 2, 5, 6>();
    add_product<Unit, kOperand, 3, 5, 7>();
}

template <class Unit>
void run_unit_rounds(Operand operand, int64_t rounds) {
    Unit::configure(kUnitRows);
    for (int64_t i = 0; i < rounds; ++i) {
        if (operand == Operand::kInt8) {
            add_products<Unit, Operand::kInt8>();
        } else {
            add_products<Unit, Operand::kBfloat16>();
        }
    }
    Unit::release();
}

inline int64_t operations_per_round(Operand operand) {
    return int64_t{4} * kUnitRows * kPanelRows * 2 * kLineBytes / operand_bytes(operand);
}

template <class Unit>
struct UnitKernelsOf {
    static constexpr UnitKernels kKernels{&unit_choices.int8_rows, &unit_choices.scales_weights, run_unit_rounds<Unit>,
                                          operations_per_round};
};

// Null where there is no unit.
template <class Unit>
constexpr const UnitKernels* unit_kernels() {
    if constexpr (Unit::kExists) {
        return &UnitKernelsOf<Unit>::kKernels;
    } else {
        return nullptr;
    }
}

}  // namespace
}  // namespace amalgam
