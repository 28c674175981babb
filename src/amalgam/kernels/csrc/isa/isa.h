// The registers and primitives of the instruction set that a translation unit is compiled for: isa/NAME.h, where the
// build defines AMALGAM_ISA as NAME. Everything else is compiled for the baseline and sees the portable ones.
#pragma once

#ifndef AMALGAM_ISA
#define AMALGAM_ISA portable
#endif

#define AMALGAM_TEXT_(x) #x
#define AMALGAM_TEXT(x) AMALGAM_TEXT_(x)
#define AMALGAM_JOIN_(a, b) a##_##b
#define AMALGAM_JOIN(a, b) AMALGAM_JOIN_(a, b)
#define AMALGAM_ISA_NAME AMALGAM_TEXT(AMALGAM_ISA)
// name_NAME: what one instruction set exports.
#define AMALGAM_OF_ISA(name) AMALGAM_JOIN(name, AMALGAM_ISA)

#define AMALGAM_ISA_HEADER AMALGAM_TEXT(AMALGAM_ISA.h)
#include AMALGAM_ISA_HEADER
