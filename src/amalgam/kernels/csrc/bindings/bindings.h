// What the extension module consists of: a function for each file that gives it what is said there.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>

#include "product/kernels.h"
#include "product/packing.h"

namespace amalgam {

// Arguments go by position where calls are made in every layer of every step: matching names costs time.
using Unlocked = nanobind::call_guard<nanobind::gil_scoped_release>;
inline auto optional() { return nanobind::arg().none(); }

// A weight in panels as Python holds it.
using MatrixPointer = std::shared_ptr<PackedMatrix>;

// The table of one instruction set's kernels; several files have methods of it.
using KernelsClass = nanobind::class_<Kernels>;

void bind_weights(nanobind::module_& module);
KernelsClass bind_isas(nanobind::module_& module);
void bind_elementwise(KernelsClass& kernels);
void bind_products(KernelsClass& kernels);
void bind_experts(nanobind::module_& module, KernelsClass& kernels);
void bind_attention(nanobind::module_& module);
void bind_sampling(nanobind::module_& module);
void bind_program(nanobind::module_& module);
void bind_runtime(nanobind::module_& module);

}  // namespace amalgam
