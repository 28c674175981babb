// Row-major bfloat16 → coded panels (bf16_coded.h).
#pragma once

#include "product/packing.h"

namespace amalgam {

// Where the exceptions of a weight of so many panels lie, from the end of its lines on.
struct CodingLayout {
    int64_t starts, exceptions, nbytes;

    CodingLayout(int64_t num_panels, int64_t num_exceptions);
    // How many there are in so many bytes; less than 0 where that cannot be.
    static int64_t num_exceptions(int64_t num_panels, int64_t nbytes);
};

// A window for each panel of a weight [rows, columns], and how many values are outside of them.
struct WindowChoice {
    std::vector<uint8_t> windows;
    int64_t num_exceptions;
};
WindowChoice choose_windows(const Kernels& kernels, const uint16_t* weight, int64_t rows, int64_t columns);

// What a weight takes with as many exceptions as one may have that is coded.
int64_t most_coded_bytes(int64_t rows, int64_t columns);

// Whether the exceptions are so few that they cost next to nothing in a product, and the weight large enough to gain.
bool is_worth_coding(int64_t num_exceptions, int64_t rows, int64_t columns);

// Writes the lines of a matrix whose format and sizes are set, and what else it has behind them.
Coding encode(const Kernels& kernels, const Matrix& matrix, std::vector<uint8_t> windows, const uint16_t* weight,
              uint8_t* memory);

// What `encode` wrote behind the lines. Throws std::invalid_argument at what would make a product read outside.
Coding read_coding(const Matrix& matrix, const uint8_t* memory, int64_t nbytes);

}  // namespace amalgam
