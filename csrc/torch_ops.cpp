// Table of contents: every schema of torch.ops.spcxr.* (LibTorch stable ABI, no Python C API).
// Fakes and autograd are registered in Python (spcxr/ops).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

#include "core/group_mask.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct GroupMaskCall {
  spcxr::Law law;
  Tensor image_ids, blocks, mask;

  int64_t count() const { return image_ids.size(0); }
  const int64_t* ids() const { return static_cast<const int64_t*>(image_ids.data_ptr()); }
  int32_t* block(int64_t b) const {
    return static_cast<int32_t*>(blocks.data_ptr()) + b * law.max_blocks * 4;
  }
  bool* cell(int64_t b) const { return static_cast<bool*>(mask.data_ptr()) + b * law.cells(); }
};

GroupMaskCall prepare(const Tensor& image_ids, int64_t seed, int64_t epoch,
                      const std::vector<int64_t>& grid, const std::vector<int64_t>& target,
                      const std::vector<int64_t>& sides, bool torus, int64_t max_blocks) {
  STD_TORCH_CHECK(image_ids.dim() == 1 && image_ids.scalar_type() == ScalarType::Long,
                  "group_mask: image ids must be [B] int64");
  STD_TORCH_CHECK(grid.size() == 2 && target.size() == 2 && sides.size() == 4,
                  "group_mask: grid and target are pairs, sides are four numbers");
  STD_TORCH_CHECK(seed >= 0 && epoch >= 0 && epoch <= INT64_C(0xFFFFFFFF),
                  "group_mask: give 0 <= seed, 0 <= epoch < 2**32");
  for (const auto* values : {&grid, &target, &sides}) {
    for (const int64_t value : *values) {
      STD_TORCH_CHECK(value >= 0 && value <= INT64_C(0xFFFFFFFF), "group_mask: ", value,
                      " is no part of a law");
    }
  }
  const auto u = [](int64_t value) { return static_cast<uint32_t>(value); };
  const spcxr::Law law{static_cast<int32_t>(grid[0]), static_cast<int32_t>(grid[1]),
                       u(target[0]), u(target[1]), u(sides[0]), u(sides[1]), u(sides[2]),
                       u(sides[3]), torus, static_cast<int32_t>(max_blocks)};
  const char* reason = spcxr::refuse(law);
  STD_TORCH_CHECK(reason == nullptr, reason);
  const int64_t count = image_ids.size(0);
  return {law, torch::stable::contiguous(image_ids),
          torch::stable::new_empty(image_ids, {count, max_blocks, 4}, ScalarType::Int),
          torch::stable::new_empty(image_ids, {count, grid[0], grid[1]}, ScalarType::Bool)};
}

std::tuple<Tensor, Tensor> group_mask_on_cpu(Tensor image_ids, int64_t seed, int64_t epoch,
                                             std::vector<int64_t> grid, std::vector<int64_t> target,
                                             std::vector<int64_t> sides, bool torus,
                                             int64_t max_blocks) {
  const auto call = prepare(image_ids, seed, epoch, grid, target, sides, torus, max_blocks);
  for (int64_t b = 0; b < call.count(); ++b) {
    STD_TORCH_CHECK(call.ids()[b] >= 0 && call.ids()[b] < spcxr::kMaxImageId,
                    "group_mask: image id ", call.ids()[b], " is not in [0, 2**48)");
  }
  const auto some = [&](int64_t begin, int64_t end) {
    spcxr::group_mask_cpu(call.ids() + begin, end - begin, seed, epoch, call.law, call.block(begin),
                          call.cell(begin));
  };
  torch::stable::parallel_for(0, call.count(), 16, some);
  return {call.blocks, call.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY(spcxr, m) {
  m.def(
      "group_mask(Tensor image_ids, SymInt seed, SymInt epoch, int[] grid, int[] target, "
      "int[] sides, bool torus, int max_blocks) -> (Tensor blocks, Tensor mask)");
}

STABLE_TORCH_LIBRARY_IMPL(spcxr, CPU, m) { m.impl("group_mask", TORCH_BOX(&group_mask_on_cpu)); }

#ifdef SPCXR_CUDA
// Weak: a CPU-only torch has no such symbol, and no CUDA tensor either.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

std::tuple<Tensor, Tensor> group_mask_on_cuda(Tensor image_ids, int64_t seed, int64_t epoch,
                                              std::vector<int64_t> grid,
                                              std::vector<int64_t> target,
                                              std::vector<int64_t> sides, bool torus,
                                              int64_t max_blocks) {
  const torch::stable::accelerator::DeviceGuard guard(image_ids.get_device_index());
  const auto call = prepare(image_ids, seed, epoch, grid, target, sides, torus, max_blocks);
  const char* error =
      spcxr::group_mask_cuda(call.ids(), call.count(), seed, epoch, call.law, call.block(0),
                             call.cell(0), current_stream(image_ids.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, "group_mask: ", error);
  return {call.blocks, call.mask};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spcxr, CUDA, m) { m.impl("group_mask", TORCH_BOX(&group_mask_on_cuda)); }
#endif
