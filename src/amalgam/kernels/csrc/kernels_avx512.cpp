#include "rms_norm.h"

namespace amalgam {

const Kernels kAvx512Kernels = {"avx512", rms_norm};

}  // namespace amalgam
