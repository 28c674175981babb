#define AMALGAM_SIMD_AVX512
#include "activations.h"
#include "product.h"
#include "rms_norm.h"

namespace amalgam {

const Kernels kAvx512Kernels = {"avx512", convert,  product, gate_up, combine,
                                expand,   rms_norm, rotate,  swiglu,  boltzmann};

}  // namespace amalgam
