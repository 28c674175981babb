// Row-major weights → panels (matrix.h), and back to values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "product/kernels.h"

namespace amalgam {

// A weight as PackedWeight holds it. Element [r, i] has the scale at [r / block_rows, i / block_columns].
struct PackArgs {
    Format format;
    int64_t rows;
    int64_t columns;
    const void* weight;  // [rows, columns]; int4: input 2k in the low nibble of byte k; other codes: a byte each;
                         // codebooks: [rows, columns / inputs of a vector, books], of a byte or two
    const void* scale;   // [scale_rows, scale_columns], or null
    DType scale_dtype;
    int64_t scale_rows;
    int64_t scale_columns;
    int64_t block_rows;
    int64_t block_columns;
    const uint8_t* zero;  // integers: [rows, scale_columns], or null
    const void* offset;   // [rows, scale_columns] of scale_dtype, or null
    Offset offset_kind;
    const int8_t* part_scale;    // formats with parts: [rows, parts]
    const int8_t* part_minimum;  // the same, or null
    const float* table;          // tables: [16], a factor and a divisor of all scales
    const void* books;           // codebooks: as Matrix has them, of these sizes
    BookSizes book_sizes;
    const int32_t* order;  // integers: packed input → input, or null
    bool quantizes;        // integer formats: whether bfloat16 activations are quantized to int8
    bool codes;  // bf16: whether to store it in 12 bits where few values are exceptions (formats/bf16_coded.h)
    const Kernels* kernels = nullptr;  // where `codes`: who does; the bytes are the same with all
};

// A weight that is in panels already, as another PackedMatrix had them in its memory.
struct ViewArgs {
    Format format;
    int64_t rows;
    int64_t columns;
    const uint8_t* memory;  // nbytes, from a 64-byte boundary on
    int64_t nbytes;
    DType scale_dtype;
    int64_t num_groups;  // 0: no scale
    int64_t group;       // inputs that share a scale, where there are several groups
    int scale_lanes;     // 16 or 1
    bool has_zero;
    Offset offset_kind;
    const int32_t* order;  // a permutation of the inputs, or null
    bool quantizes;
    BookSizes book_sizes;  // codebooks only
};

// What a coded weight has besides its lines, as Matrix describes it.
struct Coding {
    std::vector<uint8_t> windows;
    std::vector<int32_t> exception_starts;
    std::vector<Exception> exceptions;
};

// The format and the sizes of a matrix, without memory.
Matrix empty_matrix(Format format, int64_t rows, int64_t columns, bool quantizes);

// Throws std::invalid_argument unless a weight of so many columns can have codebooks of these sizes, in bytes that are
// whole for every input.
void check_books(const BookSizes& sizes, int64_t columns);

// Where what a weight has lies in its memory; what it does not have takes no bytes.
struct MemoryLayout {
    int64_t scale, zero, offset, parts, table, nbytes;
};

// A Matrix and its memory: lines, scales, zero points, offsets, integer scales of parts, table, one after the other; of
// a coded weight, lines, windows, starts and exceptions.
class PackedMatrix {
 public:
    // Null if the weight holds something that panels cannot: NaN in fp8, a table of no integers.
    static std::shared_ptr<PackedMatrix> pack(const PackArgs& args);

    // Reads the caller's memory, which must outlive it. Throws std::invalid_argument unless the sizes are possible and
    // what the layout takes is exactly `nbytes`, so that no product reads outside.
    static std::shared_ptr<PackedMatrix> view(const ViewArgs& args);

    ~PackedMatrix();
    PackedMatrix(const PackedMatrix&) = delete;
    PackedMatrix& operator=(const PackedMatrix&) = delete;

    const Matrix& matrix() const { return matrix_; }
    const uint8_t* memory() const { return matrix_.lines; }
    const MemoryLayout& layout() const { return layout_; }
    int64_t nbytes() const { return layout_.nbytes; }

 private:
    PackedMatrix(const PackArgs& args, Format format, int64_t num_exceptions);
    explicit PackedMatrix(const ViewArgs& args);
    void set_order(const int32_t* order);
    void set_books(const BookSizes& sizes);
    void set_layout(bool has_zero, int64_t num_exceptions);
    void set_memory(const uint8_t* memory, bool has_zero);
    bool set_table();
    void set_coding(Coding coding);

    Matrix matrix_;
    std::vector<int32_t> order_, position_;
    Coding coding_;
    MemoryLayout layout_{};
    uint8_t* owned_ = nullptr;  // null: the memory is somebody else's
};

// out [rows, columns]: the weight's exact values.
void unpack(const Kernels& kernels, const Matrix& matrix, float* out, int num_threads);

// out [num_ids, columns]: rows of the weight. Throws std::out_of_range.
void embedding(const Kernels& kernels, const Matrix& matrix, const int64_t* row_ids, int64_t num_ids, void* out,
               DType out_dtype, int num_threads);

}  // namespace amalgam
