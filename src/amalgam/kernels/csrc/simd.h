// The registers of the instruction set that a translation unit is for; it says so before its first include.
#pragma once

#if defined(AMALGAM_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(AMALGAM_SIMD_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
