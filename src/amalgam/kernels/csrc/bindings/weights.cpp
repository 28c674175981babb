// Weights in panels: their formats, how they are packed, and packed memory that is looked at again.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "formats/bf16_coding.h"
#include "formats/table.h"
#include "product/packing.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// What a format has, or may have, and how it is packed.
struct FormatTraits {
    int64_t bits, part, unit;  // of a code; inputs of a part, or 0; inputs that are packed together
    bool scale, zero, offset, order, minimum, table, books;
};

FormatTraits traits_of(Format format) {
    return with_format(format, [](auto found) {
        using F = decltype(found);
        return FormatTraits{F::kIsBytes ? 8 : F::kBits,
                            F::kPart,
                            F::kColumns,
                            F::kHasScale,
                            F::kTakesZero,
                            F::kTakesOffset,
                            F::kTakesOrder,
                            F::kPart > 0 && F::kTakesOffset,
                            F::kIsTable,
                            F::kIsCodebooks};
    });
}

// Of rows of `args.columns` values, or of codes for vectors of codebooks.
void set_weight(PackArgs& args, const FormatTraits& has, const Tensor& weight, const Tensor& books) {
    weight.dense("weight", kAnyKind, {kAny, kAny});
    args.weight = weight.data();
    args.rows = weight.shape(0);
    const int64_t columns = args.columns, row_bits = weight.shape(1) * weight.item_bits();
    require(has.books == static_cast<bool>(books), "codebooks that the format does not have, or none that it has");
    if (!books) {
        require(args.rows > 0 && columns > 0 && row_bits == (columns * has.bits + 7) / 8 * 8,
                "weight is " + weight.describe() + "; needed: rows of " + std::to_string(columns) + " values of " +
                    std::to_string(has.bits) + " bits");
        return;
    }
    books.dense("books", kFloats, {kAny, kAny, kAny});
    const BookSizes sizes{books.shape(0), books.shape(1), books.shape(2), books.dtype()};
    check_books(sizes, columns);
    require(args.rows > 0 && row_bits == columns / sizes.inputs * sizes.number * sizes.code_bytes() * 8,
            "weight is " + weight.describe() + "; needed: codes of " + std::to_string(sizes.code_bytes()) +
                " bytes for vectors of " + books.describe());
    require(args.block_rows == 1 && args.block_columns >= columns, "a row of this format has one scale");
    args.books = books.data();
    args.book_sizes = sizes;
}

// One for each block of the weight.
void set_scale(PackArgs& args, const Tensor& scale) {
    require(args.block_rows > 0 && args.block_columns > 0, "block has a size below 1");
    scale.dense("scale", kFloats | kUint8, {kAny, kAny});
    require(scale.item_bits() == 8 * dtype_bytes(args.scale_dtype),
            "scale is " + scale.describe() + ", which is not of its type");
    args.scale = scale.data();
    args.scale_rows = scale.shape(0);
    args.scale_columns = scale.shape(1);
    const int64_t grid_rows = (args.rows + args.block_rows - 1) / args.block_rows;
    const int64_t grid_columns = (args.columns + args.block_columns - 1) / args.block_columns;
    require((args.scale_rows == 1 || args.scale_rows == grid_rows) &&
                (args.scale_columns == 1 || args.scale_columns == grid_columns),
            "scale is " + scale.describe() + "; needed: (" + std::to_string(grid_rows) + ", " +
                std::to_string(grid_columns) + ") for blocks of (" + std::to_string(args.block_rows) + ", " +
                std::to_string(args.block_columns) + ")");
}

// Integer scales of parts, and minima or none.
void set_parts(PackArgs& args, const FormatTraits& has, const Tensor& part_scale, const Tensor& part_minimum) {
    require(args.columns % has.unit == 0 && args.scale_columns == args.columns / has.unit,
            "groups of this format have " + std::to_string(has.unit) + " inputs");
    const int64_t parts = args.columns / has.part;
    args.part_scale = part_scale.dense("part_scale", kInt8, {args.rows, parts}).data<const int8_t>();
    if (!part_minimum) return;
    args.part_minimum = part_minimum.dense("part_minimum", kInt8, {args.rows, parts}).data<const int8_t>();
}

// weight: as PackArgs has it; columns cannot be told from its shape where two of them share a byte. block: rows and
// columns that share a scale.
MatrixPointer pack(const Kernels& kernels, Format format, int64_t columns, const Tensor& weight, const Tensor& scale,
                   DType scale_dtype, std::pair<int64_t, int64_t> block, const Tensor& zero, const Tensor& offset,
                   Offset offset_kind, const Tensor& part_scale, const Tensor& part_minimum, const Tensor& table,
                   const Tensor& order, bool quantizes, bool codes, const Tensor& books) {
    const FormatTraits has = traits_of(format);
    PackArgs args{};
    args.format = format;
    args.columns = columns;
    args.scale_dtype = scale_dtype;
    args.scale_rows = args.scale_columns = 1;
    std::tie(args.block_rows, args.block_columns) = block;
    args.offset_kind = offset_kind;
    args.quantizes = quantizes;
    args.codes = codes;
    args.kernels = &kernels;
    set_weight(args, has, weight, books);
    require(has.scale == static_cast<bool>(scale) && (has.zero || !zero) && (has.order || !order) &&
                (has.offset || !offset) && static_cast<bool>(offset) == (offset_kind != Offset::kNone) &&
                (!zero || !offset) && (has.part > 0) == static_cast<bool>(part_scale) &&
                has.minimum == static_cast<bool>(part_minimum) && (!has.minimum || offset_kind == Offset::kMinimum) &&
                has.table == static_cast<bool>(table),
            "a scale, a zero, an offset, a table or an order that the format does not have, or not what it has");
    if (scale) set_scale(args, scale);
    require((!offset && !part_scale && !table) || args.block_rows == 1, "a scale of this format belongs to one row");
    if (zero) args.zero = zero.dense("zero", kUint8, {args.rows, args.scale_columns}).data<const uint8_t>();
    if (offset) args.offset = offset.dense("offset", scale.kind(), {args.rows, args.scale_columns}).data();
    if (part_scale) set_parts(args, has, part_scale, part_minimum);
    if (table) args.table = table.dense("table", kFloat32, {18}).data<const float>();
    if (order) args.order = order.dense("order", kInt32, {columns}).data<const int32_t>();
    return PackedMatrix::pack(args);
}

// The memory is kept alive by what is returned.
MatrixPointer view(Format format, int64_t rows, int64_t columns, const Tensor& memory, DType scale_dtype,
                   int64_t num_groups, int64_t group, int scale_lanes, bool has_zero, Offset offset_kind,
                   const Tensor& order, bool quantizes, std::tuple<int64_t, int64_t, int64_t> books, DType book_dtype) {
    memory.dense("memory", kUint8, {kAny});
    const auto* permutation = order ? order.dense("order", kInt32, {columns}).data<const int32_t>() : nullptr;
    const BookSizes sizes{std::get<0>(books), std::get<1>(books), std::get<2>(books), book_dtype};
    return PackedMatrix::view({format, rows, columns, memory.data<const uint8_t>(), memory.size(), scale_dtype,
                               num_groups, group, scale_lanes, has_zero, offset_kind, permutation, quantizes, sizes});
}

using ByteArray = nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>, nb::device::cpu>;

// The matrix's bytes as a tensor that keeps it alive.
ByteArray memory(nb::handle self) {
    const auto& packed = nb::cast<const PackedMatrix&>(self);
    return ByteArray(const_cast<uint8_t*>(packed.memory()), {static_cast<size_t>(packed.nbytes())}, self);
}

template <class... F>
void bind_formats(nb::module_& module, FormatList<F...>) {
    nb::enum_<Format> formats(module, "Format");
    (formats.value(F::kName, kFormat<F>), ...);
}

}  // namespace

void bind_weights(nb::module_& module) {
    using namespace nb::literals;
    nb::enum_<DType>(module, "DType")
        .value("float32", DType::kFloat32)
        .value("bfloat16", DType::kBfloat16)
        .value("float16", DType::kFloat16)
        .value("float8_e4m3fn", DType::kFp8)
        .value("float8_e8m0fnu", DType::kE8m0);
    nb::enum_<Offset>(module, "Offset")
        .value("none", Offset::kNone)
        .value("zero", Offset::kZero)
        .value("minimum", Offset::kMinimum);
    bind_formats(module, Formats{});
    nb::class_<PackedMatrix>(module, "Matrix")
        .def_prop_ro("memory", &memory)
        .def_prop_ro("format", [](const PackedMatrix& packed) { return packed.matrix().format; })
        .def_prop_ro("scale_lanes", [](const PackedMatrix& packed) { return packed.matrix().scale_lanes; })
        .def_prop_ro("begins", [](const PackedMatrix& packed) {
            const MemoryLayout& at = packed.layout();
            return std::make_tuple(at.scale, at.zero, at.offset, at.parts, at.table, at.nbytes);
        });
    module.def("pack", &pack, "kernels"_a, "format"_a, "columns"_a, "weight"_a, "scale"_a.none(), "scale_dtype"_a,
               "block"_a, "zero"_a.none(), "offset"_a.none(), "offset_kind"_a, "part_scale"_a.none(),
               "part_minimum"_a.none(), "table"_a.none(), "order"_a.none(), "quantizes"_a, "codes"_a,
               "books"_a.none() = nb::none(), Unlocked());
    module.def("view", &view, "format"_a, "rows"_a, "columns"_a, "memory"_a, "scale_dtype"_a, "num_groups"_a, "group"_a,
               "scale_lanes"_a, "has_zero"_a, "offset_kind"_a, "order"_a.none(), "quantizes"_a,
               "books"_a = std::make_tuple(int64_t{0}, int64_t{0}, int64_t{0}), "book_dtype"_a = DType::kFloat32,
               nb::keep_alive<0, 4>());
    module.def("most_coded_bytes", &most_coded_bytes, "rows"_a, "columns"_a);
    module.attr("layout_version") = kLayoutVersion;
}

}  // namespace amalgam
