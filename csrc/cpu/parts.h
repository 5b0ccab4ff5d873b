// Scratch in parts. Internal to the object files of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spcxr {
namespace SPCXR_ISA {
namespace {

// Hands out parts of the thread's scratch; counts first, with no memory, what it will need.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    char* const part = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(part);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace SPCXR_ISA
}  // namespace spcxr
