// int1 to int5: unsigned codes of a few bits, less a zero point of half their range or, where the weight has them, one
// per row and group; or with a floating offset per row and group.
//
// A code is cut into nibbles, pairs of bits and single bits, and each of these has lines of its own, so that a shift
// and a mask put the same piece of four inputs of all rows in place. Four inputs that follow each other are a quad, one
// to a byte of a lane. A step is the least number of inputs that fills whole lines, which come in this order:
//
//     nibbles   8 inputs a line    quads low|high
//     pairs    16 inputs a line    quads 0 to 3 from the lowest bits on
//     bits     32 inputs a line    quads 0 to 7 from the lowest bit on
//
// 4 bits are the first kind alone (as in int4.h), 5 bits the first and the last: 32 inputs in five lines.
#pragma once

#include <utility>

#include "formats/format.h"

namespace amalgam {
namespace {

template <int kBits>
struct CodeLines {
    static constexpr int kNibbles = kBits & 4, kPairs = kBits & 2, kSingles = kBits & 1;
    static constexpr int kStep = kSingles ? 32 : kPairs ? 16 : 8;
    static constexpr int kQuads = kStep / 4;
    static constexpr int kLines = kStep * kBits / 32;
    static constexpr int kFirstPair = kNibbles ? kStep / 8 : 0;  // line
    static constexpr int kFirstSingle = kFirstPair + (kPairs ? kStep / 16 : 0);

    // Quad kQuad, counted from the step at `lines` on, across steps.
    template <int kQuad>
    static Bytes quad(const uint8_t* lines) {
        constexpr int kWithin = kQuad % kQuads;
        lines += kQuad / kQuads * kLines * kLineBytes;
        const auto line = [&](int index) { return load_bytes(lines + index * kLineBytes); };
        constexpr int kRest = kNibbles + kPairs;
        if constexpr (kNibbles) {
            const Bytes low = field<kWithin % 2 * 4, 15>(line(kWithin / 2));
            if constexpr (kPairs) {
                return join(low, field<kWithin % 4 * 2 - kNibbles, 3 << kNibbles>(line(kFirstPair + kWithin / 4)));
            } else if constexpr (kSingles) {
                return join(low, field<kWithin - kRest, 1 << kRest>(line(kFirstSingle)));
            } else {
                return low;
            }
        } else if constexpr (kPairs) {
            const Bytes low = field<kWithin % 4 * 2, 3>(line(kFirstPair + kWithin / 4));
            if constexpr (kSingles) return join(low, field<kWithin - kRest, 1 << kRest>(line(kFirstSingle)));
            return low;
        } else {
            return field<kWithin, 1>(line(kFirstSingle));
        }
    }

    // The codes of one input of all rows.
    static void read(const uint8_t* lines, int64_t position, uint32_t* codes) {
        lines += position / kStep * kLines * kLineBytes;
        const int within = static_cast<int>(position % kStep), quad = within / 4, byte = within % 4 * 8;
        const auto add = [&](int line, int from, uint32_t mask, int to) {
            uint32_t words[kPanelRows];
            std::memcpy(words, lines + line * kLineBytes, sizeof words);
            for (int lane = 0; lane < kPanelRows; ++lane) codes[lane] |= (words[lane] >> (byte + from) & mask) << to;
        };
        for (int lane = 0; lane < kPanelRows; ++lane) codes[lane] = 0;
        if constexpr (kNibbles != 0) add(quad / 2, quad % 2 * 4, 15, 0);
        if constexpr (kPairs != 0) add(kFirstPair + quad / 4, quad % 4 * 2, 3, kNibbles);
        if constexpr (kSingles != 0) add(kFirstSingle, quad, 1, kNibbles + kPairs);
    }

    // One step of a row, a byte a code, into its lane of lines that are zero.
    static void write(const uint8_t* codes, uint32_t* lane) {
        for (int quad = 0; quad < kQuads; ++quad) {
            uint32_t word;
            std::memcpy(&word, codes + 4 * quad, sizeof word);
            if constexpr (kNibbles != 0) lane[quad / 2 * kPanelRows] |= (word & 0x0f0f0f0f) << quad % 2 * 4;
            if constexpr (kPairs != 0) {
                lane[(kFirstPair + quad / 4) * kPanelRows] |= (word >> kNibbles & 0x03030303) << quad % 4 * 2;
            }
            if constexpr (kSingles != 0) {
                lane[kFirstSingle * kPanelRows] |= (word >> (kNibbles + kPairs) & 0x01010101) << quad;
            }
        }
    }
};

// Quads of codes as they are.
template <int kBits>
struct CodeLoader {
    explicit CodeLoader(const Run&) {}
    template <int kQuad>
    Bytes quad(const uint8_t* lines) const {
        return CodeLines<kBits>::template quad<kQuad>(lines);
    }
};

// Lines of codes that int8 activations multiply.
template <class F, int kBits>
struct CodeFormat : LineFormat<F, kBits> {
    using Lines = CodeLines<kBits>;
    using Quads = Lines;
    static constexpr Operand kOperand = Operand::kInt8;
    static constexpr bool kHasScale = true, kIsCodes = true, kIsBytes = true;
    static constexpr int64_t kDirectRows = kAnyRows;
    static constexpr int kColumns = Lines::kStep;
    static constexpr int kPart = 0;  // inputs of a part (nested.h)
    static constexpr bool kIsTable = false;
    static constexpr int kZero = 1 << (kBits - 1);
    static constexpr int kLargest = (1 << kBits) - 1;

    static float decode(uint32_t code, float zero) { return static_cast<float>(static_cast<int32_t>(code)) - zero; }
    static void read_codes(const uint8_t* lines, int64_t position, uint32_t* codes) {
        Lines::read(lines, position, codes);
    }

    using Loader = CodeLoader<kBits>;
    static Partial dot(const Partial& sum, const Bytes& w, Operand4 x) { return dot_codes(sum, w, x); }
};

struct Int1 : CodeFormat<Int1, 1> {
    static constexpr const char* kName = "int1";
    static constexpr bool kTakesZero = true, kTakesOffset = true, kTakesOrder = true;
};

struct Int2 : CodeFormat<Int2, 2> {
    static constexpr const char* kName = "int2";
    static constexpr bool kTakesZero = true, kTakesOffset = true, kTakesOrder = true;
};

struct Int3 : CodeFormat<Int3, 3> {
    static constexpr const char* kName = "int3";
    static constexpr bool kTakesZero = true, kTakesOffset = true, kTakesOrder = true;
};

struct Int5 : CodeFormat<Int5, 5> {
    static constexpr const char* kName = "int5";
    static constexpr bool kTakesZero = true, kTakesOffset = true, kTakesOrder = true;
};

}  // namespace
}  // namespace amalgam
