#define AMALGAM_SIMD_AVX2
#include "activations.h"
#include "norms.h"
#include "product.h"

namespace amalgam {

const Kernels kAvx2Kernels = {"avx2", convert, product,    gate_up,     combine,    expand,   rms_norm,
                              rotate, swiglu,  layer_norm, elementwise, scale_rows, boltzmann};

}  // namespace amalgam
