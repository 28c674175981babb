#include "product/packing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/bf16_coding.h"
#include "formats/table.h"
#include "isa/float_types.h"
#include "runtime/arena.h"
#include "runtime/placement.h"
#include "runtime/pool.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace amalgam {
namespace {

uint32_t load_partial(const uint8_t* from, int64_t bytes) {
    uint32_t word = 0;
    std::memcpy(&word, from, static_cast<size_t>(bytes));
    return word;
}

// Up to 16 rows of `row_bytes` bytes → the lines of one panel. Returns false where lines cannot hold them.
template <class F>
bool pack_panel(const uint8_t* rows, int64_t num_rows, int64_t row_bytes, int64_t num_lines, uint8_t* out) {
    auto* lanes = reinterpret_cast<uint32_t*>(out);
    const int64_t full_lines = row_bytes / 4;
    uint32_t refused = 0;
    for (int64_t line = 0; line < num_lines; ++line, lanes += kPanelRows) {
        const int64_t bytes = line < full_lines ? 4 : std::max<int64_t>(row_bytes - 4 * line, 0);
        for (int64_t row = 0; row < kPanelRows; ++row) {
            const uint8_t* from = rows + row * row_bytes + 4 * line;
            const uint32_t word = row < num_rows ? load_partial(from, bytes) : 0;
            refused |= F::unpackable(word);
            lanes[row] = F::encode(word);
        }
    }
    return refused == 0;
}

// in [16 rows][16 words] → out [16 words][16 rows].
void transpose(const uint32_t (*in)[kPanelRows], uint32_t* out) {
#if defined(__SSE2__)
    const auto load = [&](int row, int word) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(&in[row][word]));
    };
    for (int row = 0; row < kPanelRows; row += 4) {
        for (int word = 0; word < kPanelRows; word += 4) {
            const __m128i a = load(row, word), b = load(row + 1, word), c = load(row + 2, word),
                          d = load(row + 3, word);
            const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
            const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
            auto* to = reinterpret_cast<__m128i*>(out + word * kPanelRows + row);
            constexpr int kLine = kPanelRows / 4;
            _mm_store_si128(to, _mm_unpacklo_epi64(ab_low, cd_low));
            _mm_store_si128(to + kLine, _mm_unpackhi_epi64(ab_low, cd_low));
            _mm_store_si128(to + 2 * kLine, _mm_unpacklo_epi64(ab_high, cd_high));
            _mm_store_si128(to + 3 * kLine, _mm_unpackhi_epi64(ab_high, cd_high));
        }
    }
#else
    for (int word = 0; word < kPanelRows; ++word) {
        for (int row = 0; row < kPanelRows; ++row) out[word * kPanelRows + row] = in[row][word];
    }
#endif
}

// Whole panels, the bulk of every weight. A row is read by cache lines: rows whose distance is a power of two fall on
// the same few places of the first-level cache and would drive each other out between one word and the next.
template <class F>
bool pack_whole_panel(const uint8_t* rows, int64_t row_bytes, uint8_t* out) {
    constexpr int64_t kBlockBytes = 4 * kPanelRows;
    uint32_t refused = 0;
    int64_t at = 0;
    for (; at + kBlockBytes <= row_bytes; at += kBlockBytes, out += kPanelRows * kLineBytes) {
        alignas(64) uint32_t block[kPanelRows][kPanelRows];
        for (int64_t row = 0; row < kPanelRows; ++row) {
            uint32_t* words = block[row];
            std::memcpy(words, rows + row * row_bytes + at, kBlockBytes);
            for (int i = 0; i < kPanelRows; ++i) {
                refused |= F::unpackable(words[i]);
                words[i] = F::encode(words[i]);
            }
        }
        transpose(block, reinterpret_cast<uint32_t*>(out));
    }
    for (; at < row_bytes; at += 4, out += kLineBytes) {
        for (int64_t row = 0; row < kPanelRows; ++row) {
            uint32_t word;
            std::memcpy(&word, rows + row * row_bytes + at, sizeof word);
            refused |= F::unpackable(word);
            reinterpret_cast<uint32_t*>(out)[row] = F::encode(word);
        }
    }
    return refused == 0;
}

// From a byte for each code.
template <class F>
bool pack_codes(const Matrix& matrix, const uint8_t* weight, uint8_t* out) {
    using Lines = typename F::Lines;
    const int64_t padded = matrix.padded_columns();
    std::memset(out, 0, static_cast<size_t>(matrix.num_panels() * matrix.panel_bytes()));
    std::vector<uint8_t> row(static_cast<size_t>(padded), 0);
    for (int64_t r = 0; r < matrix.rows; ++r) {
        const uint8_t* codes = weight + r * matrix.columns;
        if (matrix.order != nullptr || padded != matrix.columns) {
            for (int64_t i = 0; i < matrix.columns; ++i) {
                row[static_cast<size_t>(i)] = codes[matrix.order != nullptr ? matrix.order[i] : i];
            }
            codes = row.data();
        }
        auto* lane = reinterpret_cast<uint32_t*>(out + r / kPanelRows * matrix.panel_bytes()) + r % kPanelRows;
        for (int64_t i = 0; i < padded; i += Lines::kStep, lane += Lines::kLines * kPanelRows) {
            Lines::write(codes + i, lane);
        }
    }
    return true;
}

// Codes of vectors, in panels without lines.
template <class Code>
bool pack_vectors(const Matrix& matrix, const uint8_t* weight, uint8_t* out) {
    const int64_t codes = matrix.columns / matrix.book_sizes.inputs * matrix.book_sizes.number;
    std::memset(out, 0, static_cast<size_t>(matrix.num_panels() * matrix.panel_bytes()));
    for (int64_t row = 0; row < matrix.rows; ++row) {
        const auto* from = reinterpret_cast<const Code*>(weight) + row * codes;
        auto* to = reinterpret_cast<Code*>(out + row / kPanelRows * matrix.panel_bytes()) + row % kPanelRows;
        for (int64_t i = 0; i < codes; ++i) to[i * kPanelRows] = from[i];
    }
    return true;
}

// Integer scales and minima of parts.
template <class F>
void pack_parts(const Matrix& matrix, const int8_t* scale, const int8_t* minimum, uint8_t* out) {
    const int64_t parts = matrix.columns / F::kPart;
    std::memset(out, 0, static_cast<size_t>(matrix.num_panels() * matrix.num_pairs() * F::kPairBytes));
    for (int64_t row = 0; row < matrix.rows; ++row) {
        uint8_t* pairs = out + row / kPanelRows * matrix.num_pairs() * F::kPairBytes;
        for (int64_t part = 0; part < parts; ++part) {
            const int64_t at = row * parts + part;
            F::write_parts(pairs + part / 2 * F::kPairBytes, static_cast<int>(row % kPanelRows),
                           static_cast<int>(part % 2), scale[at], minimum != nullptr ? minimum[at] : int8_t{0});
        }
    }
}

template <class F>
bool pack_lines(const Matrix& matrix, const uint8_t* weight, uint8_t* out) {
    if constexpr (F::kIsBytes) return pack_codes<F>(matrix, weight, out);
    if constexpr (F::kIsCodebooks) {
        const bool is_wide = matrix.book_sizes.code_bytes() == 2;
        return is_wide ? pack_vectors<uint16_t>(matrix, weight, out) : pack_vectors<uint8_t>(matrix, weight, out);
    }
    const int64_t row_bytes = (matrix.columns * F::kBits + 7) / 8;
    const int64_t num_lines = matrix.panel_bytes() / kLineBytes;
    std::vector<uint8_t> ordered;
    for (int64_t panel = 0; panel < matrix.num_panels(); ++panel, out += matrix.panel_bytes()) {
        const int64_t num_rows = std::min<int64_t>(kPanelRows, matrix.rows - panel * kPanelRows);
        const uint8_t* rows = weight + panel * kPanelRows * row_bytes;
        if constexpr (F::kTakesOrder && !F::kIsBytes) {
            if (matrix.order != nullptr) {
                ordered.assign(static_cast<size_t>(num_rows * row_bytes), 0);
                for (int64_t row = 0; row < num_rows; ++row) {
                    F::reorder(rows + row * row_bytes, matrix.order, matrix.columns, ordered.data() + row * row_bytes);
                }
                rows = ordered.data();
            }
        }
        const bool is_whole = num_rows == kPanelRows && row_bytes == 4 * num_lines;
        const bool is_packed = is_whole ? pack_whole_panel<F>(rows, row_bytes, out)
                                        : pack_panel<F>(rows, num_rows, row_bytes, num_lines, out);
        if (!is_packed) return false;
    }
    return true;
}

// [grid rows, groups] → [panels, groups, lanes].
template <class T>
void pack_grid(const Matrix& matrix, const T* grid, int64_t block_rows, int lanes, T* out) {
    for (int64_t panel = 0; panel < matrix.num_panels(); ++panel) {
        for (int64_t group = 0; group < matrix.num_groups; ++group) {
            for (int lane = 0; lane < lanes; ++lane) {
                const int64_t row = panel * kPanelRows + lane;
                *out++ = row < matrix.rows ? grid[row / block_rows * matrix.num_groups + group] : T{};
            }
        }
    }
}

bool has_table(Format format) {
    return with_format(format, [](auto found) { return decltype(found)::kIsTable; });
}

bool has_books(Format format) { return format == kFormat<Codebooks>; }

constexpr int64_t kTableBytes = 18 * sizeof(float);  // 16 values, factor, divisor

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Whether sizes that somebody wrote into a file can be those of a weight; products rely on it.
void check_sizes(const ViewArgs& args) {
    constexpr int64_t kMost = int64_t{1} << 30;  // so that the products of sizes below stay within 64 bits
    const bool has_scale = with_format(args.format, [](auto format) { return decltype(format)::kHasScale; });
    const bool takes_zero = with_format(args.format, [](auto format) { return decltype(format)::kTakesZero; });
    const bool takes_order = with_format(args.format, [](auto format) { return decltype(format)::kTakesOrder; });
    const bool takes_offset = with_format(args.format, [](auto format) { return decltype(format)::kTakesOffset; });
    const int64_t part = with_format(args.format, [](auto format) { return decltype(format)::kPart; });
    const int64_t unit = with_format(args.format, [](auto format) { return decltype(format)::kColumns; });
    require(args.rows > 0 && args.rows <= kMost && args.columns > 0 && args.columns <= kMost,
            "a weight must have between 1 and 2^30 rows and columns");
    require(reinterpret_cast<uintptr_t>(args.memory) % kLineBytes == 0, "panels must begin at a 64-byte boundary");
    require((args.num_groups > 0) == has_scale, "quantized formats have scales and nothing else has");
    require(args.scale_lanes == 1 || args.scale_lanes == kPanelRows, "a scale must belong to 1 or 16 rows");
    require(!args.has_zero || takes_zero, "this format has no zero points");
    require(args.order == nullptr || takes_order, "this format has no order of inputs");
    require(args.offset_kind == Offset::kNone || takes_offset, "this format has no offsets");
    require(has_books(args.format) || args.book_sizes.number == 0, "this format has no codebooks");
    if (has_books(args.format)) {
        check_books(args.book_sizes, args.columns);
        require(args.num_groups == 1, "a row of this format has one scale");
    }
    if (part > 0) {
        require(args.columns % unit == 0 && args.num_groups == args.columns / unit &&
                    (args.num_groups == 1 || args.group == unit),
                "a group of this format has 256 inputs");
        require((args.offset_kind == Offset::kMinimum) == takes_offset, "this format has minima or it has none");
    }
    if (args.num_groups <= 1) return;
    require(args.group > 0 && args.group <= kMost, "a group must have at least one input");
    require(args.num_groups == (args.columns + args.group - 1) / args.group, "the groups do not cover the inputs");
}

}  // namespace

Matrix empty_matrix(Format format, int64_t rows, int64_t columns, bool quantizes) {
    return with_format(format, [&](auto found) {
        using F = decltype(found);
        Matrix matrix{};
        matrix.format = format;
        matrix.bytes_per_input = F::kBytesPerInput;
        matrix.column_unit = F::kColumns;
        matrix.part = F::kPart;
        matrix.pair_bytes = F::kPairBytes;
        matrix.factor = matrix.divisor = matrix.table_unit = 1.0f;
        matrix.operand = F::kOperand == Operand::kInt8 && !quantizes ? Operand::kBfloat16 : F::kOperand;
        matrix.rows = rows;
        matrix.columns = columns;
        return matrix;
    });
}

void check_books(const BookSizes& sizes, int64_t columns) {
    constexpr int64_t kMostBooks = 256, kMostVectors = 65536;
    require(sizes.number > 0 && sizes.number <= kMostBooks, "a weight must have between 1 and 256 codebooks");
    require(sizes.dtype == DType::kFloat32 || sizes.dtype == DType::kBfloat16 || sizes.dtype == DType::kFloat16,
            "codebooks must be floating");
    require(sizes.vectors > 1 && sizes.vectors <= kMostVectors && (sizes.vectors & (sizes.vectors - 1)) == 0,
            "a codebook must have a power of two of vectors, 2 to 65536");
    require(sizes.inputs > 0 && sizes.inputs % kColumnUnit == 0 && columns % sizes.inputs == 0 &&
                sizes.number * sizes.code_bytes() * kPanelRows % sizes.inputs == 0,
            "the vectors of a codebook must have a multiple of 8 inputs that divides the weight's");
}

void PackedMatrix::set_books(const BookSizes& sizes) {
    if (!has_books(matrix_.format)) return;
    matrix_.book_sizes = sizes;
    matrix_.bytes_per_input = static_cast<int>(sizes.number * sizes.code_bytes() * kPanelRows / sizes.inputs);
}

PackedMatrix::PackedMatrix(const PackArgs& args, Format format, int64_t num_exceptions)
    : matrix_(empty_matrix(format, args.rows, args.columns, args.quantizes)) {
    set_books(args.book_sizes);
    matrix_.num_groups = args.scale != nullptr ? args.scale_columns : 0;
    matrix_.group = matrix_.num_groups > 1 ? args.block_columns : matrix_.padded_columns();
    matrix_.scale_dtype = args.scale_dtype;
    matrix_.scale_lanes = args.scale_rows == 1 || args.block_rows % kPanelRows == 0 ? 1 : kPanelRows;
    matrix_.offset_kind = args.offset_kind;
    set_order(args.order);
    set_layout(args.zero != nullptr, num_exceptions);
    owned_ = allocate_weight(static_cast<size_t>(layout_.nbytes));
    const int64_t panels = matrix_.num_panels();
    const int64_t starts[] = {0, layout_.scale, layout_.zero, layout_.offset, layout_.parts, layout_.table};
    for (int i = 0; i < 5; ++i) touch_by_node(owned_ + starts[i], panels, (starts[i + 1] - starts[i]) / panels);
    // Between sections lie bytes of nobody's, and the same weight is to be the same bytes wherever it lies.
    for (int64_t end : {starts[1], starts[2], starts[3], starts[4], starts[5], layout_.nbytes}) {
        const int64_t begin = std::max<int64_t>(end - kLineBytes, 0);
        std::memset(owned_ + begin, 0, static_cast<size_t>(end - begin));
    }
    set_memory(owned_, args.zero != nullptr);
    const auto pack_floats = [&](const void* grid, int64_t block_rows, int lanes, uint8_t* out) {
        switch (dtype_bytes(args.scale_dtype)) {
            case 4:
                return pack_grid(matrix_, static_cast<const uint32_t*>(grid), block_rows, lanes,
                                 reinterpret_cast<uint32_t*>(out));
            case 2:
                return pack_grid(matrix_, static_cast<const uint16_t*>(grid), block_rows, lanes,
                                 reinterpret_cast<uint16_t*>(out));
            default:
                return pack_grid(matrix_, static_cast<const uint8_t*>(grid), block_rows, lanes, out);
        }
    };
    if (args.scale != nullptr) {
        const int64_t block_rows = args.scale_rows == 1 ? args.rows : args.block_rows;
        pack_floats(args.scale, block_rows, matrix_.scale_lanes, owned_ + layout_.scale);
    }
    if (args.zero != nullptr) pack_grid(matrix_, args.zero, 1, kPanelRows, owned_ + layout_.zero);
    if (args.offset != nullptr) pack_floats(args.offset, 1, kPanelRows, owned_ + layout_.offset);
    if (matrix_.part > 0) {
        with_format(format, [&](auto found) {
            using F = decltype(found);
            if constexpr (F::kPart > 0) {
                pack_parts<F>(matrix_, args.part_scale, args.part_minimum, owned_ + layout_.parts);
            }
            return true;
        });
    }
    if (args.table != nullptr) std::memcpy(owned_ + layout_.table, args.table, kTableBytes);
    if (args.books != nullptr) {
        std::memcpy(owned_ + layout_.table, args.books, static_cast<size_t>(args.book_sizes.nbytes()));
    }
}

PackedMatrix::PackedMatrix(const ViewArgs& args)
    : matrix_(empty_matrix(args.format, args.rows, args.columns, args.quantizes)) {
    check_sizes(args);
    set_books(args.book_sizes);
    matrix_.num_groups = args.num_groups;
    matrix_.group = args.num_groups > 1 ? args.group : matrix_.padded_columns();
    matrix_.scale_dtype = args.scale_dtype;
    matrix_.scale_lanes = args.scale_lanes;
    matrix_.offset_kind = args.offset_kind;
    set_layout(args.has_zero, 0);
    if (args.format == kFormat<CodedBf16> && args.nbytes > layout_.nbytes) layout_.nbytes = args.nbytes;  // exceptions
    require(layout_.nbytes == args.nbytes, "a weight of this layout takes " + std::to_string(layout_.nbytes) +
                                               " bytes, not " + std::to_string(args.nbytes));
    set_memory(args.memory, args.has_zero);
    set_order(args.order);
    require(set_table(), "the table of a weight has values that are no integers of a common unit");
    if (args.format == kFormat<CodedBf16>) {
        set_coding(read_coding(matrix_, args.memory + layout_.scale, layout_.nbytes - layout_.scale));
    }
}

void PackedMatrix::set_coding(Coding coding) {
    coding_ = std::move(coding);
    matrix_.windows = coding_.windows.data();
    matrix_.exception_starts = coding_.exception_starts.data();
    matrix_.exceptions = coding_.exceptions.data();
}

void PackedMatrix::set_layout(bool has_zero, int64_t num_exceptions) {
    const int64_t panels = matrix_.num_panels(), grid = panels * matrix_.num_groups;
    const int64_t scale_bytes = dtype_bytes(matrix_.scale_dtype);
    const bool has_offset = matrix_.offset_kind != Offset::kNone;
    int64_t end = panels * matrix_.panel_bytes();
    const auto take = [&](int64_t bytes) {
        const int64_t at = bytes > 0 ? align(end) : end;
        end = at + bytes;
        return at;
    };
    layout_.scale = take(grid * matrix_.scale_lanes * scale_bytes);
    layout_.zero = take(has_zero ? grid * kPanelRows : 0);
    layout_.offset = take(has_offset ? grid * kPanelRows * scale_bytes : 0);
    layout_.parts = take(panels * matrix_.num_pairs() * matrix_.pair_bytes);
    layout_.table = take(has_table(matrix_.format) ? kTableBytes : matrix_.book_sizes.nbytes());
    if (matrix_.format == kFormat<CodedBf16>) end += CodingLayout(panels, num_exceptions).nbytes;
    layout_.nbytes = end;
    if (!matrix_.has_even_groups() && matrix_.operand == Operand::kInt8) matrix_.operand = Operand::kBfloat16;
}

void PackedMatrix::set_memory(const uint8_t* memory, bool has_zero) {
    matrix_.lines = memory;
    if (matrix_.num_groups > 0) matrix_.scale = memory + layout_.scale;
    if (has_zero) matrix_.zero = memory + layout_.zero;
    if (matrix_.offset_kind != Offset::kNone) matrix_.offset = memory + layout_.offset;
    if (matrix_.part > 0) matrix_.parts = memory + layout_.parts;
    if (has_table(matrix_.format)) matrix_.table = reinterpret_cast<const float*>(memory + layout_.table);
    if (has_books(matrix_.format)) matrix_.books = memory + layout_.table;
}

// Reads the table, if there is one. Whether it is one of the format's: integers of int8 times a unit of 1 or a half, or
// any floats.
bool PackedMatrix::set_table() {
    if (!has_table(matrix_.format)) return true;
    matrix_.factor = matrix_.table[16];
    matrix_.divisor = matrix_.table[17];
    if (matrix_.format == kFormat<FloatTable4>) return true;
    for (const float unit : {1.0f, 0.5f}) {
        bool fits = true;
        for (int i = 0; i < 16; ++i) {
            const float value = matrix_.table[i] / unit;
            fits = fits && value >= -127.0f && value <= 127.0f && value == static_cast<float>(static_cast<int>(value));
            if (fits) matrix_.looked_up[i] = static_cast<int8_t>(value);
        }
        matrix_.table_unit = unit;
        if (fits) return true;
    }
    return false;
}

void PackedMatrix::set_order(const int32_t* order) {
    if (order == nullptr) return;
    order_.assign(order, order + matrix_.columns);
    position_.assign(order_.size(), -1);
    for (size_t i = 0; i < order_.size(); ++i) {
        const int32_t input = order_[i];
        require(input >= 0 && input < matrix_.columns && position_[static_cast<size_t>(input)] < 0,
                "the order of the inputs is no permutation");
        position_[static_cast<size_t>(input)] = static_cast<int32_t>(i);
    }
    matrix_.order = order_.data();
    matrix_.position = position_.data();
}

std::shared_ptr<PackedMatrix> PackedMatrix::pack(const PackArgs& args) {
    require(args.format != kFormat<CodedBf16>, "values are packed as bf16, which may be coded");
    if (args.format == kFormat<Bf16> && args.codes) {
        const auto* values = static_cast<const uint16_t*>(args.weight);
        WindowChoice found = choose_windows(*args.kernels, values, args.rows, args.columns);
        if (is_worth_coding(found.num_exceptions, args.rows, args.columns)) {
            std::shared_ptr<PackedMatrix> coded(new PackedMatrix(args, kFormat<CodedBf16>, found.num_exceptions));
            coded->set_coding(encode(*args.kernels, coded->matrix_, std::move(found.windows), values, coded->owned_));
            return coded;
        }
    }
    std::shared_ptr<PackedMatrix> packed(new PackedMatrix(args, args.format, 0));
    const auto* weight = static_cast<const uint8_t*>(args.weight);
    const bool is_packed = with_format(args.format, [&](auto format) {
        return pack_lines<decltype(format)>(packed->matrix_, weight, packed->owned_);
    });
    return is_packed && packed->set_table() ? packed : nullptr;
}

std::shared_ptr<PackedMatrix> PackedMatrix::view(const ViewArgs& args) {
    return std::shared_ptr<PackedMatrix>(new PackedMatrix(args));
}

PackedMatrix::~PackedMatrix() {
    if (owned_ != nullptr) free_weight(owned_);
}

void unpack(const Kernels& kernels, const Matrix& matrix, float* out, int num_threads) {
    parallel_for(matrix.num_panels(), num_threads, [&](int64_t panel) {
        alignas(64) float piece[kChunk * kPanelRows];
        const int64_t rows = std::min<int64_t>(kPanelRows, matrix.rows - panel * kPanelRows);
        for (int64_t first = 0; first < matrix.columns; first += kChunk) {
            const int64_t end = std::min<int64_t>(first + kChunk, matrix.columns);
            kernels.expand(matrix, panel, first, end, piece);
            for (int64_t row = 0; row < rows; ++row) {
                float* to = out + (panel * kPanelRows + row) * matrix.columns;
                for (int64_t i = first; i < end; ++i) to[i] = piece[(i - first) * kPanelRows + row];
            }
        }
    });
}

void embedding(const Kernels& kernels, const Matrix& matrix, const int64_t* row_ids, int64_t num_ids, void* out,
               DType out_dtype, int num_threads) {
    for (int64_t i = 0; i < num_ids; ++i) {
        if (row_ids[i] < 0 || row_ids[i] >= matrix.rows) {
            throw std::out_of_range("id " + std::to_string(row_ids[i]) + " of " + std::to_string(matrix.rows) +
                                    " rows");
        }
    }
    parallel_for(num_ids, num_threads, [&](int64_t i) {
        alignas(64) float piece[kChunk * kPanelRows];
        const int64_t panel = row_ids[i] / kPanelRows, lane = row_ids[i] % kPanelRows;
        void* row = advance(out, out_dtype, i * matrix.columns);
        for (int64_t first = 0; first < matrix.columns; first += kChunk) {
            const int64_t end = std::min<int64_t>(first + kChunk, matrix.columns);
            kernels.expand(matrix, panel, first, end, piece);
            for (int64_t column = first; column < end; ++column) {
                const float value = piece[(column - first) * kPanelRows + lane];
                if (out_dtype == DType::kFloat32) {
                    static_cast<float*>(row)[column] = value;
                } else {
                    narrow(value, static_cast<Bfloat16*>(row) + column);
                }
            }
        }
    });
}

}  // namespace amalgam
