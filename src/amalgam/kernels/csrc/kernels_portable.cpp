#include "activations.h"
#include "product.h"
#include "rms_norm.h"

namespace amalgam {

const Kernels kPortableKernels = {"portable", convert,  product, gate_up, combine,
                                  expand,     rms_norm, rotate,  swiglu,  boltzmann};

}  // namespace amalgam
