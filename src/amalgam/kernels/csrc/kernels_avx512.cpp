#include "activations.h"
#include "product.h"
#include "rms_norm.h"
#include "simd_avx512.h"

namespace amalgam {

const Kernels kAvx512Kernels = {"avx512", convert, product, gate_up, combine, expand, rms_norm, rotate, swiglu};

}  // namespace amalgam
