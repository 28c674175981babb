// Chooses and makes the activations that products need; shared by the drivers.
#pragma once

#include "product/linear.h"
#include "runtime/pool.h"
#include "runtime/workspace.h"

namespace amalgam {

// Rows to be converted, and where to.
struct Conversion {
    ConvertArgs args;
    int64_t rows;
};

// Packed input → input for products of this kind; those in float32 take the inputs in their own order, like all others.
inline const int32_t* gather_order(const Matrix& weight, Operand kind) {
    return kind == Operand::kFloat32 ? nullptr : weight.order;
}

// Rows whose strides are a power of two fall on the same lines of the first-level cache: where more rows than this
// meet, they are copied with a line in between.
constexpr int64_t kMaxDirectRows = 4;

// Whether the product can read `rows` rows of x as they are.
inline bool is_operand(const Matrix& weight, Operand kind, DType x_dtype, int64_t rows) {
    if (rows > kMaxDirectRows || gather_order(weight, kind) != nullptr || weight.columns != weight.padded_columns())
        return false;
    return (kind == Operand::kBfloat16 && x_dtype == DType::kBfloat16) ||
           (kind == Operand::kFloat32 && x_dtype == DType::kFloat32);
}

// A matrix unit reads whole tiles of up to 16 rows, of equal height: of 128 rows, up to 7 more.
constexpr int64_t kSpareRows = 7;

// Memory for `rows` rows in the form that a product with this weight reads; `conversion` fills it.
inline Activations plan_conversion(const Matrix& weight, Operand kind, const void* x, DType x_dtype,
                                   const int32_t* index, int64_t rows, Workspace& workspace, Conversion* conversion) {
    const int64_t padded = weight.padded_columns();
    const int64_t stride = padded + kLineBytes / operand_bytes(kind);
    const int64_t chunk = accumulation_chunk(weight, kind);
    const int64_t num_chunks = (padded + chunk - 1) / chunk;
    ConvertArgs args{x,
                     x_dtype,
                     weight.columns,
                     index,
                     gather_order(weight, kind),
                     weight.columns,
                     padded,
                     kind,
                     chunk,
                     stride,
                     nullptr,
                     nullptr,
                     nullptr,
                     0,
                     nullptr};
    switch (kind) {
        case Operand::kInt8:
            args.values = workspace.take<int8_t>((rows + kSpareRows) * stride);
            args.scale = workspace.take<float>(rows * num_chunks);
            args.sum = workspace.take<int32_t>(rows * num_chunks);
            if (weight.part > 0) {
                args.part = weight.part;
                args.part_sums = workspace.take<int16_t>(rows * padded / weight.part);
            }
            break;
        case Operand::kBfloat16:
            args.values = workspace.take<uint16_t>((rows + kSpareRows) * stride);
            break;
        case Operand::kFloat32:
            args.values = workspace.take<float>((rows + kSpareRows) * stride);
            break;
    }
    *conversion = {args, rows};
    return {kind, chunk, stride, args.values, args.scale, args.sum, nullptr, padded, args.part, args.part_sums};
}

// Whether activations that were made for another weight are those that this one reads.
inline bool is_shared(const Activations& known, const Matrix& weight, Operand kind) {
    return known.kind == kind && known.chunk == accumulation_chunk(weight, kind) &&
           known.padded_columns == weight.padded_columns() &&
           (kind != Operand::kInt8 || weight.part == 0 || known.part == weight.part);
}

inline void run_conversions(const Execution& execution, const std::vector<Conversion>& conversions) {
    // A few µs of work each: below that, a round of all threads costs more than it helps.
    constexpr int64_t kElementsPerItem = 1 << 13;
    struct Item {
        const ConvertArgs* args;
        int64_t first, end;
    };
    std::vector<Item> items;
    for (const Conversion& conversion : conversions) {
        const int64_t step = std::max<int64_t>(1, kElementsPerItem / conversion.args.stride);
        for (int64_t row = 0; row < conversion.rows; row += step) {
            items.push_back({&conversion.args, row, std::min(row + step, conversion.rows)});
        }
    }
    parallel_for(static_cast<int64_t>(items.size()), execution.num_threads, [&](int64_t i) {
        const Item& item = items[static_cast<size_t>(i)];
        execution.kernels->convert(*item.args, item.first, item.end);
    });
}

}  // namespace amalgam
