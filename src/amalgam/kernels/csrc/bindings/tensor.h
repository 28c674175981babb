// Tensors as the extension's functions see them: read once, checked once, with errors that name the argument.
//
// They come through DLPack's C exchange interface (`__dlpack_c_exchange_api__`), which describes a tensor in place.
// `__dlpack__`, and so nanobind's own `ndarray`, makes an object for each, which takes much longer.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "product/matrix.h"

namespace amalgam {

// Types of elements, as a set.
constexpr unsigned kFloat32 = 1 << 0, kBfloat16 = 1 << 1, kFloat16 = 1 << 2, kInt64 = 1 << 3, kInt32 = 1 << 4,
                   kUint8 = 1 << 5, kInt8 = 1 << 6, kFp8 = 1 << 7;
constexpr unsigned kActivations = kFloat32 | kBfloat16, kFloats = kActivations | kFloat16,
                   kCaches = kFloats | kInt8 | kFp8, kAnyKind = ~0u;

constexpr int64_t kAny = -1;  // a size that does not matter

inline void require(bool is_met, const std::string& what) {
    if (!is_met) throw std::invalid_argument(what);
}

// An argument, which lives until the call returns. It may be None or no tensor at all: the checks say so.
class Tensor {
 public:
    Tensor() = default;
    explicit Tensor(nanobind::handle object) : object_(object) {
        const Exchange* exchange = object.is_none() ? nullptr : exchange_of(Py_TYPE(object.ptr()));
        if (exchange == nullptr || exchange->describe == nullptr) return;
        is_tensor_ = true;
        has_memory_ = exchange->describe(object.ptr(), &view_) == 0;
        if (!has_memory_) PyErr_Clear();  // sparse, or on no device at all
    }

    explicit operator bool() const { return object_.is_valid() && !object_.is_none(); }
    nanobind::handle object() const { return object_; }

    int64_t ndim() const { return view_.ndim; }
    // Of dimension i, from the end if i < 0.
    int64_t shape(int i) const { return view_.shape[i < 0 ? view_.ndim + i : i]; }
    int64_t stride(int i) const { return view_.strides[i < 0 ? view_.ndim + i : i]; }
    int64_t size() const {
        int64_t size = 1;
        for (int i = 0; i < view_.ndim; ++i) size *= view_.shape[i];
        return size;
    }
    int64_t item_bits() const { return int64_t{view_.dtype.bits} * view_.dtype.lanes; }

    template <class T = void>
    T* data() const {
        return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    }

    DType dtype() const {
        const unsigned found = kind();
        return found == kFloat32    ? DType::kFloat32
               : found == kBfloat16 ? DType::kBfloat16
               : found == kFloat16  ? DType::kFloat16
               : found == kInt8     ? DType::kInt8
                                    : DType::kFp8;
    }

    // --- Checks; each throws an error that names the argument ---

    // In memory that the kernels read, of one of these types.
    const Tensor& any(const char* name, unsigned kinds) const { return check(name, kinds, nullptr, 0); }
    // And without gaps.
    const Tensor& dense(const char* name, unsigned kinds) const { return check(name, kinds, nullptr, view_.ndim); }
    const Tensor& dense(const char* name, unsigned kinds, std::initializer_list<int64_t> shape) const {
        return check(name, kinds, &shape, static_cast<int>(shape.size()));
    }
    // The last `num_dense` dimensions without gaps, the others with strides that are not negative.
    const Tensor& rows(const char* name, unsigned kinds, std::initializer_list<int64_t> shape,
                       int num_dense = 1) const {
        return check(name, kinds, &shape, num_dense);
    }
    // Of another's shape and type, and without gaps.
    const Tensor& like(const char* name, const Tensor& other) const {
        check(name, other.kind(), nullptr, view_.ndim);
        const bool is_same =
            view_.ndim == other.view_.ndim && std::equal(view_.shape, view_.shape + view_.ndim, other.view_.shape);
        if (!is_same) refuse(name, other.describe());
        return *this;
    }

    std::string describe() const {
        std::string text = kind_name() + " (";
        for (int i = 0; i < view_.ndim; ++i) text += (i > 0 ? ", " : "") + std::to_string(view_.shape[i]);
        return text + (view_.ndim == 1 ? ",)" : ")");
    }

    // As a set of one type; 0 for a type that has no name here.
    unsigned kind() const {
        using Code = nanobind::dlpack::dtype_code;
        if (view_.dtype.lanes != 1) return 0;
        const auto is = [&](Code code, int bits) {
            return view_.dtype.code == static_cast<uint8_t>(code) && view_.dtype.bits == bits;
        };
        return is(Code::Float, 32)          ? kFloat32
               : is(Code::Bfloat, 16)       ? kBfloat16
               : is(Code::Float, 16)        ? kFloat16
               : is(Code::Int, 64)          ? kInt64
               : is(Code::Int, 32)          ? kInt32
               : is(Code::UInt, 8)          ? kUint8
               : is(Code::Int, 8)           ? kInt8
               : is(Code::Float8_E4M3FN, 8) ? kFp8
                                            : 0;
    }

 private:
    // What a type of tensors offers (DLPack 1.2 and later); `describe` fills in the view without owning anything.
    struct Exchange {
        struct {
            uint32_t major, minor;
        } version;
        const Exchange* previous;
        void* other_functions[3];
        int (*describe)(void* object, nanobind::dlpack::dltensor* view);
        void* current_stream;
    };

    // Of the last type that was asked, which is nearly always the one that is asked next. With the GIL.
    static const Exchange* exchange_of(PyTypeObject* of) {
        static PyObject* known = nullptr;
        static const Exchange* found = nullptr;
        auto type = reinterpret_cast<PyObject*>(of);  // the stable ABI takes no other
        if (type == known) return found;
        PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
        const void* api = capsule != nullptr ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
        Py_XDECREF(capsule);  // the type keeps it
        if (api == nullptr) {
            PyErr_Clear();
            return nullptr;
        }
        Py_INCREF(type);
        Py_XDECREF(known);
        known = type;
        found = static_cast<const Exchange*>(api);
        while (found != nullptr && found->version.major != 1) found = found->previous;
        return found;
    }

    const Tensor& check(const char* name, unsigned kinds, const std::initializer_list<int64_t>* shape,
                        int num_dense) const {
        if (!is_tensor_) refuse_object(name);
        if (!has_memory_) throw std::invalid_argument(std::string(name) + " is not a dense tensor on the CPU");
        constexpr int kCpu = 1;
        bool fits = view_.device.device_type == kCpu && (kinds == kAnyKind || (kinds & kind()) != 0);
        if (shape != nullptr) {
            fits = fits && view_.ndim == static_cast<int>(shape->size());
            for (int i = 0; fits && i < view_.ndim; ++i) {
                const int64_t wanted = shape->begin()[i];
                fits = wanted == kAny || wanted == view_.shape[i];
            }
        }
        int64_t stride = 1;
        for (int i = view_.ndim - 1; fits && i >= 0 && size() > 0; --i) {
            const bool is_dense = i >= view_.ndim - num_dense;
            fits = view_.shape[i] == 1 || (is_dense ? view_.strides[i] == stride : view_.strides[i] >= 0);
            stride *= view_.shape[i];
        }
        if (!fits) refuse(name, expectation(kinds, shape, num_dense));
        return *this;
    }

    [[noreturn]] void refuse(const char* name, const std::string& expected) const {
        std::string found = describe();
        if (view_.device.device_type != 1) found += " on another device";
        if (size() > 0 && view_.ndim > 0) {
            found += " with strides (";
            for (int i = 0; i < view_.ndim; ++i) found += (i > 0 ? ", " : "") + std::to_string(view_.strides[i]);
            found += ")";
        }
        throw std::invalid_argument(std::string(name) + " is " + found + "; needed: " + expected + " on the CPU");
    }

    // Whoever calls may have released the GIL; the stable ABI tells the name of a type only with it.
    [[noreturn]] void refuse_object(const char* name) const {
        std::string type = "nothing";
        if (object_.ptr() != nullptr) {
            nanobind::gil_scoped_acquire held;
            type = nanobind::steal<nanobind::str>(PyType_GetName(Py_TYPE(object_.ptr()))).c_str();
        }
        throw nanobind::type_error((std::string(name) + " is a " + type + "; needed: a tensor").c_str());
    }

    static std::string expectation(unsigned kinds, const std::initializer_list<int64_t>* shape, int num_dense) {
        std::string text;
        if (kinds != kAnyKind) {
            constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "int64",
                                              "int32",   "uint8",    "int8",    "float8_e4m3fn"};
            for (unsigned i = 0; i < 8; ++i) {
                if ((kinds >> i & 1) != 0) text += (text.empty() ? "" : " or ") + std::string(kNames[i]);
            }
        }
        if (shape != nullptr) {
            text += " (";
            for (const int64_t* size = shape->begin(); size != shape->end(); ++size) {
                text += (size == shape->begin() ? "" : ", ") + (*size == kAny ? "any" : std::to_string(*size));
            }
            text += ")";
            if (num_dense < static_cast<int>(shape->size())) {
                return text + " without gaps in the last " + std::to_string(num_dense) + " dimensions";
            }
        }
        return text + (num_dense > 0 ? " without gaps" : "");
    }

    std::string kind_name() const {
        using Code = nanobind::dlpack::dtype_code;
        const std::string bits = std::to_string(view_.dtype.bits);
        switch (static_cast<Code>(view_.dtype.code)) {
            case Code::Int:
                return "int" + bits;
            case Code::UInt:
                return "uint" + bits;
            case Code::Float:
                return "float" + bits;
            case Code::Bfloat:
                return "bfloat" + bits;
            case Code::Bool:
                return "bool";
            case Code::Float8_E4M3FN:
                return "float8_e4m3fn";
            default:
                return "another type";
        }
    }

    nanobind::handle object_;
    bool is_tensor_ = false, has_memory_ = false;
    nanobind::dlpack::dltensor view_{};
};

}  // namespace amalgam

namespace nanobind::detail {

template <>
struct type_caster<amalgam::Tensor> {
    NB_TYPE_CASTER(amalgam::Tensor, const_name("torch.Tensor"))

    bool from_python(handle source, uint8_t, cleanup_list*) noexcept {
        value = amalgam::Tensor(source);
        return true;
    }
};

}  // namespace nanobind::detail
