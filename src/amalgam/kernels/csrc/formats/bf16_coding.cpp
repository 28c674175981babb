#include "formats/bf16_coding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "formats/table.h"

namespace amalgam {
namespace {

constexpr int kWindow = 15;              // exponents; code 0 is zero
constexpr int64_t kBlock = 512;          // inputs whose lines stay in the first-level cache while all rows are written
constexpr int64_t kMaxExceptions = 512;  // one value in so many

uint8_t exponent_of(uint16_t bits) { return static_cast<uint8_t>(bits >> 7); }

// The place of a value's exponent in a window, which has those from 1 to kWindow. All in 16 bits, signed and without
// branches, as compilers need it to compute many at a time.
int16_t place_of(uint16_t bits, int16_t window) { return static_cast<int16_t>((bits >> 7 & 0xff) - window); }

int16_t is_outside(int16_t place) { return static_cast<int16_t>((place < 1) | (place > kWindow)); }

// 1 or 0.
int16_t is_exception(uint16_t bits, int16_t window) {
    const int16_t magnitude = static_cast<int16_t>(bits & 0x7fff);
    return static_cast<int16_t>(is_outside(place_of(bits, window)) & (magnitude != 0));
}

// The window with most of the values, by a sample of a large panel: counting exponents takes longer than coding them.
uint8_t choose_window(const uint16_t* values, int64_t count) {
    constexpr int64_t kSample = 4096, kStretch = 16;
    const int64_t step = std::max<int64_t>(kStretch, count / kSample * kStretch);
    int32_t counts[256] = {};
    for (int64_t first = 0; first < count; first += step) {
        for (int64_t i = first; i < std::min(first + kStretch, count); ++i) counts[exponent_of(values[i])]++;
    }
    int32_t within = 0, most = 0;
    int window = 0;
    for (int exponent = 1; exponent < 256; ++exponent) {
        within += counts[exponent];
        if (exponent > kWindow) within -= counts[exponent - kWindow];
        if (within > most) {
            most = within;
            window = std::max(exponent - kWindow, 0);
        }
    }
    return static_cast<uint8_t>(window);
}

int64_t count_exceptions(const uint16_t* values, int64_t count, uint8_t window) {
    constexpr int64_t kStretch = 16384;  // counts in 16 bits are quick to sum up
    int64_t total = 0;
    for (int64_t first = 0; first < count; first += kStretch) {
        const int64_t end = std::min(first + kStretch, count);
        int16_t exceptions = 0;
        for (int64_t i = first; i < end; ++i) {
            exceptions = static_cast<int16_t>(exceptions + is_exception(values[i], window));
        }
        total += exceptions;
    }
    return total;
}

// A row's values within one block → a byte of sign and mantissa and a code each; returns how many are exceptions.
int split(const uint16_t* values, int64_t count, int16_t window, uint8_t* rest, uint8_t* code) {
    int16_t exceptions = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t bits = values[i];
        const int16_t place = place_of(bits, window);
        const int16_t is_dropped = is_exception(bits, window);
        code[i] = static_cast<uint8_t>(place & (is_outside(place) - 1));
        rest[i] = static_cast<uint8_t>(((bits >> 8 & 0x80) | (bits & 0x7f)) & (is_dropped - 1));
        exceptions = static_cast<int16_t>(exceptions + is_dropped);
    }
    return exceptions;
}

// Eight values of one row → their places in three lines.
void scatter(const uint8_t* rest, const uint8_t* code, uint8_t* lines) {
    uint32_t first, second, low, high;
    std::memcpy(&first, rest, sizeof first);
    std::memcpy(&second, rest + 4, sizeof second);
    std::memcpy(&low, code, sizeof low);
    std::memcpy(&high, code + 4, sizeof high);
    const uint32_t words[] = {first, second, low | high << 4};
    for (int line = 0; line < 3; ++line) {
        std::memcpy(lines + line * kLineBytes, reinterpret_cast<const uint8_t*>(&words[line]), 2);
        std::memcpy(lines + line * kLineBytes + 8, reinterpret_cast<const uint8_t*>(&words[line]) + 2, 2);
    }
}

}  // namespace

CodingLayout::CodingLayout(int64_t num_panels, int64_t num_exceptions)
    : starts(align(num_panels)),
      exceptions(starts + align((num_panels + 1) * static_cast<int64_t>(sizeof(int32_t)))),
      nbytes(exceptions + num_exceptions * static_cast<int64_t>(sizeof(Exception))) {}

int64_t CodingLayout::num_exceptions(int64_t num_panels, int64_t nbytes) {
    const int64_t left = nbytes - CodingLayout(num_panels, 0).nbytes, size = sizeof(Exception);
    return left >= 0 && left % size == 0 ? left / size : -1;
}

WindowChoice choose_windows(const uint16_t* weight, int64_t rows, int64_t columns) {
    WindowChoice result{{}, 0};
    for (int64_t row = 0; row < rows; row += kPanelRows) {
        const int64_t count = std::min<int64_t>(kPanelRows, rows - row) * columns;
        const uint16_t* values = weight + row * columns;
        const uint8_t window = choose_window(values, count);
        result.windows.push_back(window);
        result.num_exceptions += count_exceptions(values, count, window);
    }
    return result;
}

int64_t most_coded_bytes(int64_t rows, int64_t columns) {
    const Matrix matrix = empty_matrix(kFormat<CodedBf16>, rows, columns, false);
    const int64_t panels = matrix.num_panels();
    return panels * matrix.panel_bytes() + CodingLayout(panels, rows * columns / kMaxExceptions).nbytes;
}

bool is_worth_coding(int64_t num_exceptions, int64_t rows, int64_t columns) {
    const int64_t values = (rows + kPanelRows - 1) / kPanelRows * kPanelRows * columns;
    const int64_t saved = values * 2 - values * CodedBf16::kBytesPerInput / kPanelRows;
    return num_exceptions <= rows * columns / kMaxExceptions &&
           saved > CodingLayout(rows / kPanelRows + 1, num_exceptions).nbytes;
}

Coding encode(const Matrix& matrix, std::vector<uint8_t> windows, const uint16_t* weight, uint8_t* memory) {
    Coding coding{std::move(windows), {0}, {}};
    const int64_t padded = matrix.padded_columns();
    uint8_t* lines = memory;
    for (int64_t panel = 0; panel < matrix.num_panels(); ++panel, lines += matrix.panel_bytes()) {
        const uint8_t window = coding.windows[static_cast<size_t>(panel)];
        const int64_t rows = std::min<int64_t>(kPanelRows, matrix.rows - panel * kPanelRows);
        if (rows < kPanelRows) std::memset(lines, 0, static_cast<size_t>(matrix.panel_bytes()));
        for (int64_t first = 0; first < padded; first += kBlock) {
            const int64_t end = std::min(first + kBlock, padded), count = std::min(end, matrix.columns) - first;
            for (int64_t row = 0; row < rows; ++row) {
                const uint16_t* values = weight + (panel * kPanelRows + row) * matrix.columns + first;
                uint8_t rest[kBlock], code[kBlock];
                if (split(values, count, window, rest, code) > 0) {
                    for (int64_t i = 0; i < count; ++i) {
                        if (is_exception(values[i], window) == 0) continue;
                        coding.exceptions.push_back(
                            {static_cast<int32_t>(first + i), static_cast<uint16_t>(row), values[i]});
                    }
                }
                std::memset(rest + count, 0, static_cast<size_t>(end - first - count));
                std::memset(code + count, 0, static_cast<size_t>(end - first - count));
                uint8_t* to = lines + first * matrix.bytes_per_input + row / 4 * 16 + row % 4 * 2;
                for (int64_t i = 0; i < end - first; i += kColumnUnit, to += 3 * kLineBytes) {
                    scatter(rest + i, code + i, to);
                }
            }
        }
        std::stable_sort(coding.exceptions.begin() + coding.exception_starts.back(), coding.exceptions.end(),
                         [](const Exception& a, const Exception& b) { return a.column < b.column; });
        coding.exception_starts.push_back(static_cast<int32_t>(coding.exceptions.size()));
    }
    const CodingLayout layout(matrix.num_panels(), static_cast<int64_t>(coding.exceptions.size()));
    std::memset(lines, 0, static_cast<size_t>(layout.exceptions));
    std::memcpy(lines, coding.windows.data(), coding.windows.size());
    std::memcpy(lines + layout.starts, coding.exception_starts.data(),
                coding.exception_starts.size() * sizeof(int32_t));
    if (!coding.exceptions.empty()) {
        std::memcpy(lines + layout.exceptions, coding.exceptions.data(), coding.exceptions.size() * sizeof(Exception));
    }
    return coding;
}

Coding read_coding(const Matrix& matrix, const uint8_t* memory, int64_t nbytes) {
    const auto require = [](bool condition, const char* message) {
        if (!condition) throw std::invalid_argument(message);
    };
    const int64_t panels = matrix.num_panels(), count = CodingLayout::num_exceptions(panels, nbytes);
    require(count >= 0 && count <= matrix.rows * matrix.columns / kMaxExceptions,
            "the exceptions of a coded weight do not fit its size");
    const CodingLayout layout(panels, count);
    Coding coding;
    coding.windows.assign(memory, memory + panels);
    coding.exception_starts.resize(static_cast<size_t>(panels) + 1);
    std::memcpy(coding.exception_starts.data(), memory + layout.starts,
                coding.exception_starts.size() * sizeof(int32_t));
    coding.exceptions.resize(static_cast<size_t>(count));
    if (count > 0) {
        std::memcpy(coding.exceptions.data(), memory + layout.exceptions, coding.exceptions.size() * sizeof(Exception));
    }
    const std::vector<int32_t>& starts = coding.exception_starts;
    require(starts.front() == 0 && starts.back() == count && std::is_sorted(starts.begin(), starts.end()),
            "the exceptions of a coded weight are not those of its panels");
    for (const Exception& exception : coding.exceptions) {
        require(exception.column >= 0 && exception.column < matrix.columns && exception.lane < kPanelRows,
                "an exception of a coded weight is outside of it");
    }
    return coding;
}

}  // namespace amalgam
