// The extension module amalgam._native: exposes the kernels of every instruction set to Python.
//
// What comes in is checked in this folder (tensor.h, program.h) and nowhere else: the kernels are given addresses and
// sizes.
#include <nanobind/nanobind.h>

#include "bindings/bindings.h"

NB_MODULE(_native, module) {
    // A process that ends with its weights in memory is not at fault.
    nanobind::set_leak_warnings(false);
    using namespace amalgam;
    bind_weights(module);
    KernelsClass kernels = bind_isas(module);
    bind_elementwise(kernels);
    bind_products(kernels);
    bind_experts(module, kernels);
    bind_attention(module);
    bind_sampling(module);
    bind_program(module);
    bind_runtime(module);
}
