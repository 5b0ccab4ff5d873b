// What the bindings to torch share: tensors checked and taken apart (LibTorch stable ABI).
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/views.h"

namespace spcxr {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void check(const char* reason) { STD_TORCH_CHECK(reason == nullptr, reason); }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <typename T>
const T* data(const MaybeTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// "Int [2, 4]"
inline std::string wanted(ScalarType type, const std::vector<int64_t>& shape) {
  std::string text = std::string(torch::headeronly::toString(type)) + " [";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

// A tensor of this dtype and shape, contiguous, on the device of `beside`.
inline void expect(const Tensor& t, const char* name, ScalarType type,
                   const std::vector<int64_t>& shape, const Tensor& beside) {
  bool fits = t.scalar_type() == type && t.dim() == static_cast<int64_t>(shape.size()) &&
              t.get_device() == beside.get_device() && t.is_cuda() == beside.is_cuda();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = t.size(static_cast<int64_t>(i)) == shape[i];
  }
  STD_TORCH_CHECK(fits, name, ": give ", wanted(type, shape), " on the device of the others");
  STD_TORCH_CHECK(t.is_contiguous(), name, ": not contiguous; call .contiguous()");
}

inline TokenType token_type(ScalarType type) {
  if (type == ScalarType::Float) return TokenType::kFloat32;
  if (type == ScalarType::BFloat16) return TokenType::kBFloat16;
  STD_TORCH_CHECK(type == ScalarType::Half, "tokens: give float32, bfloat16 or float16");
  return TokenType::kFloat16;
}

inline int64_t element_size(ScalarType type) { return type == ScalarType::Float ? 4 : 2; }

inline int32_t int32_of(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, value, " is no size; give 0 to 2**31 - 1");
  return static_cast<int32_t>(value);
}

inline void expect_cpu_isa(const char* isa) {
  STD_TORCH_CHECK(isa != nullptr,
                  "SPCXR_CPU_ISA: this machine or this build lacks it; unset it, or name portable");
}

}  // namespace spcxr

#ifdef SPCXR_CUDA
// Weak: a CPU-only torch has no such symbol, and no CUDA tensor either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace spcxr {

inline void* current_stream(const torch::stable::Tensor& t) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

}  // namespace spcxr
#endif
