// Products, norms and what else is done with activations, compiled for one instruction set.
#include "isa/isa.h"
#include "product/activations.h"
#include "product/norms.h"
#include "product/product.h"
#include "product/unit_rounds.h"

namespace amalgam {

extern const Kernels AMALGAM_OF_ISA(kKernels);
const Kernels AMALGAM_OF_ISA(kKernels) = {AMALGAM_ISA_NAME, panels_at_once,  unit_kernels<MatrixUnit<>>(),
                                          convert,          product,         gate_up,
                                          combine,          expand,          rms_norm,
                                          rotate,           swiglu,          layer_norm,
                                          elementwise,      scale_rows,      boltzmann,
                                          code_rows,        count_exceptions};

}  // namespace amalgam
