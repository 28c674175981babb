// The table of native kernels: one instance per instruction set, chosen at run time.
//
// A kernel knows pointers, sizes and element types; it never knows PyTorch, layers or requests. Its order of
// accumulation per output element depends only on the sizes of that element's inputs, never on the number of rows.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace amalgam {

// out[r, i] = cast(x[r, i] / sqrt(mean(x[r]^2) + eps)) * weight[i], where cast goes from float32 to the type of x, and
// weight is cast to it too. All arrays are dense and row-major; out has the type of x and may be x itself.
struct RmsNormArgs {
    const void* x;       // [rows, hidden]
    const void* weight;  // [hidden]
    void* out;           // [rows, hidden]
    int64_t rows;
    int64_t hidden;
    float eps;
    DType x_dtype;
    DType weight_dtype;
};

struct Kernels {
    const char* isa;
    void (*rms_norm)(const RmsNormArgs&);
};

extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;    // only where AMALGAM_X86 is defined
extern const Kernels kAvx512Kernels;  // likewise; uses the F, BW, DQ, VL, VNNI and BF16 parts

}  // namespace amalgam
