// The extension module amalgam._native: chooses a kernel table for this processor and exposes it to Python.
//
// Arrays come in as addresses; amalgam/kernels/native.py has checked device, layout, type and sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;

namespace amalgam {

void bind_attention(nb::module_& module);  // attention_bindings.cpp

namespace {

// Slowest first, those that this processor and operating system can run.
std::vector<const Kernels*> supported_kernels() {
    std::vector<const Kernels*> tables = {&kPortableKernels};
#ifdef AMALGAM_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        tables.push_back(&kAvx2Kernels);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")) {
            tables.push_back(&kAvx512Kernels);
        }
    }
#endif
    return tables;
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : supported_kernels()) names.emplace_back(table->isa);
    return names;
}

const Kernels& kernels(const std::string& isa) {
    for (const Kernels* table : supported_kernels()) {
        if (isa == table->isa) return *table;
    }
    throw std::invalid_argument("this processor does not support " + isa);
}

void rms_norm(const Kernels& table, uintptr_t x, uintptr_t weight, uintptr_t out, int64_t rows, int64_t hidden,
              float eps, DType x_dtype, DType weight_dtype) {
    table.rms_norm({reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(weight),
                    reinterpret_cast<void*>(out), rows, hidden, eps, x_dtype, weight_dtype});
}

}  // namespace
}  // namespace amalgam

NB_MODULE(_native, module) {
    using namespace nb::literals;
    nb::enum_<amalgam::DType>(module, "DType")
        .value("float32", amalgam::DType::kFloat32)
        .value("bfloat16", amalgam::DType::kBfloat16);
    nb::class_<amalgam::Kernels>(module, "Kernels")
        .def_prop_ro("isa", [](const amalgam::Kernels& table) { return table.isa; })
        .def("rms_norm", &amalgam::rms_norm, "x"_a, "weight"_a, "out"_a, "rows"_a, "hidden"_a, "eps"_a, "x_dtype"_a,
             "weight_dtype"_a, nb::call_guard<nb::gil_scoped_release>());
    amalgam::bind_attention(module);
    module.def("supported_isas", &amalgam::supported_isas);
    module.def("kernels", &amalgam::kernels, "isa"_a, nb::rv_policy::reference);
}
