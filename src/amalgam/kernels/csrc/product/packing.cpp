#include "product/packing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "formats/bf16_coding.h"
#include "formats/table.h"
#include "isa/float_types.h"
#include "runtime/arena.h"
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

template <class F>
bool pack_lines(const Matrix& matrix, const uint8_t* weight, uint8_t* out) {
    const int64_t row_bytes = (matrix.columns * F::kBits + 7) / 8;
    const int64_t num_lines = matrix.panel_bytes() / kLineBytes;
    std::vector<uint8_t> ordered;
    for (int64_t panel = 0; panel < matrix.num_panels(); ++panel, out += matrix.panel_bytes()) {
        const int64_t num_rows = std::min<int64_t>(kPanelRows, matrix.rows - panel * kPanelRows);
        const uint8_t* rows = weight + panel * kPanelRows * row_bytes;
        if constexpr (F::kTakesOrder) {
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

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// Whether sizes that somebody wrote into a file can be those of a weight; products rely on it.
void check_sizes(const ViewArgs& args) {
    constexpr int64_t kMost = int64_t{1} << 30;  // so that the products of sizes below stay within 64 bits
    const bool has_scale = with_format(args.format, [](auto format) { return decltype(format)::kHasScale; });
    const bool takes_zero = with_format(args.format, [](auto format) { return decltype(format)::kTakesZero; });
    const bool takes_order = with_format(args.format, [](auto format) { return decltype(format)::kTakesOrder; });
    require(args.rows > 0 && args.rows <= kMost && args.columns > 0 && args.columns <= kMost,
            "a weight must have between 1 and 2^30 rows and columns");
    require(reinterpret_cast<uintptr_t>(args.memory) % kLineBytes == 0, "panels must begin at a 64-byte boundary");
    require((args.num_groups > 0) == has_scale, "quantized formats have scales and nothing else has");
    require(args.scale_lanes == 1 || args.scale_lanes == kPanelRows, "a scale must belong to 1 or 16 rows");
    require(!args.has_zero || takes_zero, "this format has no zero points");
    require(args.order == nullptr || takes_order, "this format has no order of inputs");
    if (args.num_groups <= 1) return;
    require(args.group > 0 && args.group % kColumnUnit == 0, "a group must be a multiple of 8 inputs");
    require(args.num_groups == (args.columns + args.group - 1) / args.group, "the groups do not cover the inputs");
}

}  // namespace

Matrix empty_matrix(Format format, int64_t rows, int64_t columns, bool quantizes) {
    return with_format(format, [&](auto found) {
        using F = decltype(found);
        Matrix matrix{};
        matrix.format = format;
        matrix.bytes_per_input = F::kBytesPerInput;
        matrix.operand = F::kOperand == Operand::kInt8 && !quantizes ? Operand::kBfloat16 : F::kOperand;
        matrix.rows = rows;
        matrix.columns = columns;
        return matrix;
    });
}

PackedMatrix::PackedMatrix(const PackArgs& args, Format format, int64_t num_exceptions)
    : matrix_(empty_matrix(format, args.rows, args.columns, args.quantizes)) {
    matrix_.num_groups = args.scale != nullptr ? args.scale_columns : 0;
    matrix_.group = matrix_.num_groups > 1 ? args.block_columns : matrix_.padded_columns();
    matrix_.scale_dtype = args.scale_dtype;
    matrix_.scale_lanes = args.scale_rows == 1 || args.block_rows % kPanelRows == 0 ? 1 : kPanelRows;
    set_order(args.order);
    set_offsets(args.zero != nullptr, num_exceptions);
    owned_ = allocate_weight(static_cast<size_t>(nbytes_));
    set_memory(owned_, args.zero != nullptr);
    if (args.scale != nullptr) {
        void* scale = owned_ + scale_offset_;
        const int64_t block_rows = args.scale_rows == 1 ? args.rows : args.block_rows;
        if (dtype_bytes(args.scale_dtype) == 4) {
            pack_grid(matrix_, static_cast<const uint32_t*>(args.scale), block_rows, matrix_.scale_lanes,
                      static_cast<uint32_t*>(scale));
        } else {
            pack_grid(matrix_, static_cast<const uint16_t*>(args.scale), block_rows, matrix_.scale_lanes,
                      static_cast<uint16_t*>(scale));
        }
    }
    if (args.zero != nullptr) {
        pack_grid(matrix_, args.zero, 1, kPanelRows, owned_ + zero_offset_);
    }
}

PackedMatrix::PackedMatrix(const ViewArgs& args)
    : matrix_(empty_matrix(args.format, args.rows, args.columns, args.quantizes)) {
    check_sizes(args);
    matrix_.num_groups = args.num_groups;
    matrix_.group = args.num_groups > 1 ? args.group : matrix_.padded_columns();
    matrix_.scale_dtype = args.scale_dtype;
    matrix_.scale_lanes = args.scale_lanes;
    set_offsets(args.has_zero, 0);
    if (args.format == kFormat<CodedBf16> && args.nbytes > nbytes_) nbytes_ = args.nbytes;  // with exceptions
    require(nbytes_ == args.nbytes,
            "a weight of this layout takes " + std::to_string(nbytes_) + " bytes, not " + std::to_string(args.nbytes));
    set_memory(args.memory, args.has_zero);
    set_order(args.order);
    if (args.format == kFormat<CodedBf16>) {
        set_coding(read_coding(matrix_, args.memory + scale_offset_, nbytes_ - scale_offset_));
    }
}

void PackedMatrix::set_coding(Coding coding) {
    coding_ = std::move(coding);
    matrix_.windows = coding_.windows.data();
    matrix_.exception_starts = coding_.exception_starts.data();
    matrix_.exceptions = coding_.exceptions.data();
}

void PackedMatrix::set_offsets(bool has_zero, int64_t num_exceptions) {
    const int64_t panels = matrix_.num_panels(), grid = panels * matrix_.num_groups;
    scale_offset_ = panels * matrix_.panel_bytes();
    zero_offset_ = scale_offset_ + align(grid * matrix_.scale_lanes * dtype_bytes(matrix_.scale_dtype));
    nbytes_ = zero_offset_ + (has_zero ? grid * kPanelRows : 0);
    if (matrix_.format == kFormat<CodedBf16>) nbytes_ += CodingLayout(panels, num_exceptions).nbytes;
}

void PackedMatrix::set_memory(const uint8_t* memory, bool has_zero) {
    matrix_.lines = memory;
    if (matrix_.num_groups > 0) matrix_.scale = memory + scale_offset_;
    if (has_zero) matrix_.zero = memory + zero_offset_;
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
        WindowChoice found = choose_windows(values, args.rows, args.columns);
        if (is_worth_coding(found.num_exceptions, args.rows, args.columns)) {
            std::shared_ptr<PackedMatrix> coded(new PackedMatrix(args, kFormat<CodedBf16>, found.num_exceptions));
            coded->set_coding(encode(coded->matrix_, std::move(found.windows), values, coded->owned_));
            return coded;
        }
    }
    std::shared_ptr<PackedMatrix> packed(new PackedMatrix(args, args.format, 0));
    const auto* weight = static_cast<const uint8_t*>(args.weight);
    const bool is_packed = with_format(args.format, [&](auto format) {
        return pack_lines<decltype(format)>(packed->matrix_, weight, packed->owned_);
    });
    return is_packed ? packed : nullptr;
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
