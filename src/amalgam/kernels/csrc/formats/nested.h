// k2 to k6 and k_table4: codes in groups of 256 inputs with a float16 scale, whose parts of 16 or 32 inputs have
// integer scales of their own, as GGUF's K-quants have them
// (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h):
//
//     value = scale * part scale * (code - zero)                  k3, k6, k_table4 (whose codes look up a table)
//     value = scale * part scale * code - minimum * part minimum  k2, k4, k5
//
// Two parts that follow each other are a pair. Its integer scales lie as [16 rows, 2 parts] bytes, and behind them its
// minima in the same way; in k2 both share a byte, the scale in its low nibble. The codes' lines: codes.h.
#pragma once

#include "formats/codes.h"

namespace amalgam {
namespace {

// How the integers of a pair of parts are stored.
enum class PartKind { kScales, kScalesAndMinima, kNibbles };

template <class F, int kBits, int kPartInputs, PartKind kKind>
struct NestedFormat : CodeFormat<F, kBits> {
    static constexpr int kPart = kPartInputs;
    static constexpr int kColumns = 256;
    static constexpr PartKind kPartKind = kKind;
    static constexpr bool kTakesOffset = kKind != PartKind::kScales;
    static constexpr int kPairBytes = (kKind == PartKind::kScalesAndMinima ? 4 : 2) * kPanelRows;
    static constexpr int kZero = kTakesOffset ? 0 : 1 << (kBits - 1);

    static void load_parts(const uint8_t* pair, Pairs& scales, Pairs& minima) {
        if constexpr (kKind == PartKind::kNibbles) {
            load_nibble_pairs(pair, scales, minima);
        } else {
            scales = load_byte_pairs(pair);
            minima = kKind == PartKind::kScales ? scales : load_byte_pairs(pair + 2 * kPanelRows);
        }
    }

    // Of one row in one part.
    static int part_scale(const uint8_t* pair, int lane, int which) {
        const uint8_t byte = pair[2 * lane + which];
        return kKind == PartKind::kNibbles ? byte & 15 : static_cast<int8_t>(byte);
    }
    static int part_minimum(const uint8_t* pair, int lane, int which) {
        if constexpr (kKind == PartKind::kNibbles) return pair[2 * lane + which] >> 4;
        return static_cast<int8_t>(pair[2 * kPanelRows + 2 * lane + which]);
    }
    static void write_parts(uint8_t* pair, int lane, int which, int8_t scale, int8_t minimum) {
        uint8_t& byte = pair[2 * lane + which];
        byte = static_cast<uint8_t>(scale);
        if constexpr (kKind == PartKind::kNibbles) byte = static_cast<uint8_t>(scale | minimum << 4);
        if constexpr (kKind == PartKind::kScalesAndMinima) {
            pair[2 * kPanelRows + 2 * lane + which] = static_cast<uint8_t>(minimum);
        }
    }
};

struct K2 : NestedFormat<K2, 2, 16, PartKind::kNibbles> {
    static constexpr const char* kName = "k2";
};

struct K3 : NestedFormat<K3, 3, 16, PartKind::kScales> {
    static constexpr const char* kName = "k3";
};

struct K4 : NestedFormat<K4, 4, 32, PartKind::kScalesAndMinima> {
    static constexpr const char* kName = "k4";
};

struct K5 : NestedFormat<K5, 5, 32, PartKind::kScalesAndMinima> {
    static constexpr const char* kName = "k5";
};

struct K6 : NestedFormat<K6, 6, 16, PartKind::kScales> {
    static constexpr const char* kName = "k6";
};

}  // namespace
}  // namespace amalgam
