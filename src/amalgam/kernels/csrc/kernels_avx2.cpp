#define AMALGAM_SIMD_AVX2
#include "activations.h"
#include "product.h"
#include "rms_norm.h"

namespace amalgam {

const Kernels kAvx2Kernels = {"avx2", convert, product, gate_up, combine, expand, rms_norm, rotate, swiglu, boltzmann};

}  // namespace amalgam
