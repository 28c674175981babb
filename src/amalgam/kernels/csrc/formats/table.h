// The weight formats: one line and one include for each.
#pragma once

#include <type_traits>
#include <utility>

#include "formats/bf16.h"
#include "formats/bf16_coded.h"
#include "formats/codebooks.h"
#include "formats/codes.h"
#include "formats/float_table4.h"
#include "formats/fp16.h"
#include "formats/fp32.h"
#include "formats/fp8.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/nested.h"
#include "formats/table4.h"

namespace amalgam {
namespace {

template <class... F>
struct FormatList {};

// A format's place here is its number in Format.
using Formats = FormatList<  //
    Int4,                    //
    Int8,                    //
    Fp8,                     //
    Bf16,                    //
    Fp16,                    //
    Fp32,                    //
    CodedBf16,               //
    Int1,                    //
    Int2,                    //
    Int3,                    //
    Int5,                    //
    K2,                      //
    K3,                      //
    K4,                      //
    K5,                      //
    K6,                      //
    Table4,                  //
    KTable4,                 //
    FloatTable4,             //
    Codebooks>;

template <class F, class... All>
constexpr Format number_of(FormatList<All...>) {
    int number = 0;
    (void)((std::is_same_v<F, All> || (++number, false)) || ...);
    return static_cast<Format>(number);
}

template <class F>
constexpr Format kFormat = number_of<F>(Formats{});

// What `function` returns for an object of the format's class.
template <class Function, class... All>
auto with_format(Format format, Function&& function, FormatList<All...>) {
    std::common_type_t<decltype(function(All{}))...> result{};
    (void)((format == kFormat<All> && (result = function(All{}), true)) || ...);
    return result;
}

template <class Function>
auto with_format(Format format, Function&& function) {
    return with_format(format, std::forward<Function>(function), Formats{});
}

}  // namespace
}  // namespace amalgam
