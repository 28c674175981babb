#define AMALGAM_SIMD_AVX512
#include "activations.h"
#include "norms.h"
#include "product.h"

namespace amalgam {

const Kernels kAvx512Kernels = {"avx512", convert, product,    gate_up,     combine,    expand,   rms_norm,
                                rotate,   swiglu,  layer_norm, elementwise, scale_rows, boltzmann};

}  // namespace amalgam
