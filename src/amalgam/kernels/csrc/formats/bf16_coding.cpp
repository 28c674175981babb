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

bool is_exception(uint16_t bits, int window) {
    const int place = exponent_of(bits) - window;
    return (place < 1 || place > kWindow) && (bits & 0x7fff) != 0;
}

// The window with most of the values, by a sample of a large panel: counting exponents takes longer than coding them.
uint8_t choose_window(const uint16_t* values, int64_t count) {
    constexpr int64_t kSample = 4096, kStretch = 16;
    const int64_t step = std::max<int64_t>(kStretch, count / kSample * kStretch);
    // In turns: a count that has just been stored can only be read after a while.
    constexpr int kTurns = 4;
    int32_t turns[kTurns][256] = {}, counts[256];
    for (int64_t first = 0; first < count; first += step) {
        for (int64_t i = first; i < std::min(first + kStretch, count); ++i) turns[i % kTurns][exponent_of(values[i])]++;
    }
    for (int exponent = 0; exponent < 256; ++exponent) {
        counts[exponent] = turns[0][exponent] + turns[1][exponent] + turns[2][exponent] + turns[3][exponent];
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

// What a panel has of the inputs [first, end): its lines, and what they leave out.
class PanelCoder {
 public:
    PanelCoder(const Kernels& kernels, const Matrix& matrix, const uint16_t* weight, int64_t panel, int window)
        : kernels_(kernels),
          columns_(matrix.columns),
          values_(weight + panel * kPanelRows * matrix.columns),
          num_rows_(std::min<int64_t>(kPanelRows, matrix.rows - panel * kPanelRows)),
          window_(window) {}

    // first and end: multiples of 8 but for the last input. `lines` are those of the whole panel.
    void code(int64_t first, int64_t end, uint8_t* lines, std::vector<Exception>& exceptions) const {
        const int64_t whole = (end - first) / kColumnUnit * kColumnUnit, left = end - first - whole;
        lines += first * CodedBf16::kBytesPerInput;
        for (int64_t row = 0; row < kPanelRows; row += 4, lines += 16) {
            static constexpr uint16_t kNone[kBlock] = {};
            const uint16_t* rows[4];
            for (int64_t i = 0; i < 4; ++i) rows[i] = row + i < num_rows_ ? values(row + i) + first : kNone;
            int with_exceptions = kernels_.code_rows(rows, whole, window_, lines);
            if (left > 0) {
                uint16_t padded[4][kColumnUnit] = {};
                for (int64_t i = 0; i < 4; ++i) {
                    std::memcpy(padded[i], rows[i] + whole, static_cast<size_t>(left) * sizeof(uint16_t));
                    rows[i] = padded[i];
                }
                with_exceptions |=
                    kernels_.code_rows(rows, kColumnUnit, window_, lines + whole * CodedBf16::kBytesPerInput);
            }
            for (int64_t i = 0; i < 4; ++i) {
                if (with_exceptions >> i & 1) add_exceptions(row + i, first, end, exceptions);
            }
        }
    }

 private:
    const uint16_t* values(int64_t row) const { return values_ + row * columns_; }

    void add_exceptions(int64_t row, int64_t first, int64_t end, std::vector<Exception>& exceptions) const {
        for (int64_t i = first; i < end; ++i) {
            const uint16_t bits = values(row)[i];
            if (is_exception(bits, window_)) {
                exceptions.push_back({static_cast<int32_t>(i), static_cast<uint16_t>(row), bits});
            }
        }
    }

    const Kernels& kernels_;
    int64_t columns_;
    const uint16_t* values_;
    int64_t num_rows_;
    int window_;
};

}  // namespace

CodingLayout::CodingLayout(int64_t num_panels, int64_t num_exceptions)
    : starts(align(num_panels)),
      exceptions(starts + align((num_panels + 1) * static_cast<int64_t>(sizeof(int32_t)))),
      nbytes(exceptions + num_exceptions * static_cast<int64_t>(sizeof(Exception))) {}

int64_t CodingLayout::num_exceptions(int64_t num_panels, int64_t nbytes) {
    const int64_t left = nbytes - CodingLayout(num_panels, 0).nbytes, size = sizeof(Exception);
    return left >= 0 && left % size == 0 ? left / size : -1;
}

WindowChoice choose_windows(const Kernels& kernels, const uint16_t* weight, int64_t rows, int64_t columns) {
    WindowChoice result{{}, 0};
    for (int64_t row = 0; row < rows; row += kPanelRows) {
        const int64_t count = std::min<int64_t>(kPanelRows, rows - row) * columns;
        const uint16_t* values = weight + row * columns;
        const uint8_t window = choose_window(values, count);
        result.windows.push_back(window);
        result.num_exceptions += kernels.count_exceptions(values, count, window);
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

Coding encode(const Kernels& kernels, const Matrix& matrix, std::vector<uint8_t> windows, const uint16_t* weight,
              uint8_t* memory) {
    Coding coding{std::move(windows), {0}, {}};
    uint8_t* lines = memory;
    for (int64_t panel = 0; panel < matrix.num_panels(); ++panel, lines += matrix.panel_bytes()) {
        const PanelCoder coder(kernels, matrix, weight, panel, coding.windows[static_cast<size_t>(panel)]);
        for (int64_t first = 0; first < matrix.columns; first += kBlock) {
            coder.code(first, std::min(first + kBlock, matrix.columns), lines, coding.exceptions);
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
