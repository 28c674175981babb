// Rows multiplied with an int8, a bf16 and an fp8 E5M2 weight by the kernels of two instruction sets, bit for bit the same, and in
// double precision. Exits with 0 where all agree.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "formats/table.h"
#include "product/linear.h"

using namespace amalgam;
namespace amalgam {
extern const Kernels kKernels_portable, kKernels_toy;
}

constexpr int64_t kRows = 50, kColumns = 264, kTokens = 20;

bool is_right(const PackedMatrix& weight, const std::vector<float>& values, bool is_exact) {
    std::vector<Bfloat16> x(kTokens * kColumns);
    for (size_t i = 0; i < x.size(); ++i) narrow(std::sin(static_cast<float>(i)), &x[i]);
    std::vector<float> expected(kTokens * kRows), found(kTokens * kRows);
    const auto product = [&](const Kernels& kernels, int64_t tokens, float* out) {
        linear({&kernels, 1}, {x.data(), DType::kBfloat16, tokens, DType::kFloat32},
               {{&weight.matrix(), {nullptr, DType::kFloat32}, out}});
    };
    for (int64_t tokens = 1; tokens <= kTokens; ++tokens) {
        product(kKernels_portable, tokens, expected.data());
        product(kKernels_toy, tokens, found.data());
        if (std::memcmp(expected.data(), found.data(), sizeof(float) * tokens * kRows) != 0) return false;
    }
    for (int64_t i = 0; i < kTokens * kRows; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < kColumns; ++k) {
            sum += static_cast<double>(widen(x[i / kRows * kColumns + k])) * values[i % kRows * kColumns + k];
        }
        if (std::fabs(sum - found[i]) > (is_exact ? 1e-4 : 0.02) * kColumns) return false;
    }
    return true;
}

int main() {
    std::vector<int8_t> codes(kRows * kColumns);
    std::vector<Bfloat16> halves(codes.size());
    std::vector<uint8_t> bytes(codes.size());
    std::vector<float> scale(kRows), integers(codes.size()), floats(codes.size()), quarters(codes.size());
    for (int64_t i = 0; i < kRows; ++i) scale[i] = 0.01f + static_cast<float>(i) * 1e-4f;
    for (size_t i = 0; i < codes.size(); ++i) {
        codes[i] = static_cast<int8_t>(i * 37 % 251 - 125);
        integers[i] = codes[i] * scale[i / kColumns];
        narrow(std::cos(static_cast<float>(i)), &halves[i]);
        floats[i] = widen(halves[i]);
        bytes[i] = static_cast<uint8_t>(i % 2 << 7 | (12 + i % 5) << 2 | i % 3);  // sign, exponent, two bits
        quarters[i] = static_cast<float>((i % 2 ? -1 : 1) * std::ldexp(4 + i % 3, static_cast<int>(i % 5) - 5)) *
                      scale[i / kColumns];
    }
    const auto int8 = PackedMatrix::pack({kFormat<Int8>, kRows, kColumns, codes.data(), scale.data(), DType::kFloat32,
                                          kRows, 1, 1, kColumns, nullptr, nullptr, Offset::kNone, nullptr, nullptr,
                                          nullptr, nullptr, true, false});
    const auto bf16 =
        PackedMatrix::pack({kFormat<Bf16>, kRows, kColumns, halves.data(), nullptr, DType::kFloat32, 0, 0, 1, 1,
                            nullptr, nullptr, Offset::kNone, nullptr, nullptr, nullptr, nullptr, false, false});
    const auto e5m2 = PackedMatrix::pack({kFormat<Fp8E5m2>, kRows, kColumns, bytes.data(), scale.data(),
                                          DType::kFloat32, kRows, 1, 1, kColumns, nullptr, nullptr, Offset::kNone,
                                          nullptr, nullptr, nullptr, nullptr, false, false});
    std::puts(kKernels_toy.isa);
    const bool are_right = is_right(*int8, integers, false) && is_right(*bf16, floats, true);
    return are_right && is_right(*e5m2, quarters, true) ? 0 : 1;
}
