// Instruction sets: which there are, and their tables of kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "formats/table.h"
#include "isa/table.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

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

}  // namespace

KernelsClass bind_isas(nb::module_& module) {
    using namespace nb::literals;
    nb::class_<UnitKernels>(module, "MatrixUnit")
        .def_prop_rw(
            "int8_rows", [](const UnitKernels& unit) { return *unit.int8_rows; },
            [](const UnitKernels& unit, int64_t rows) { *unit.int8_rows = rows; })
        .def_prop_rw(
            "scales_weights", [](const UnitKernels& unit) { return *unit.scales_weights; },
            [](const UnitKernels& unit, bool scales) { *unit.scales_weights = scales; })
        .def("run", &run_unit, Unlocked());
    nb::class_<GatedKernels>(module, "GatedKernels").def_prop_ro("isa", [](const GatedKernels& table) {
        return table.isa;
    });
    module.def("supported_isas", &supported_isas);
    module.def("kernels", &kernels, "isa"_a, nb::rv_policy::reference);
    module.def("attention_kernels", &attention_kernels, "isa"_a, nb::rv_policy::reference);
    module.def("gated_kernels", &gated_kernels, "isa"_a, nb::rv_policy::reference);
    return nb::class_<Kernels>(module, "Kernels")
        .def_prop_ro("isa", [](const Kernels& table) { return table.isa; })
        .def_prop_ro("unit", [](const Kernels& table) { return table.unit; }, nb::rv_policy::reference);
}

}  // namespace amalgam
