// Table of contents: every schema of torch.ops.spcxr.* (LibTorch stable ABI, no Python C API).
// Fakes and autograd are registered in Python (spcxr/ops).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "core/group_mask.h"
#include "core/patch_checks.h"
#include "core/patch_gather.h"
#include "torch_calls.h"

namespace {

using namespace spcxr;

struct GroupMaskCall {
  Law law;
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
  const Law law{static_cast<int32_t>(grid[0]), static_cast<int32_t>(grid[1]),
                       u(target[0]), u(target[1]), u(sides[0]), u(sides[1]), u(sides[2]),
                       u(sides[3]), torus, static_cast<int32_t>(max_blocks)};
  const char* reason = refuse(law);
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
    STD_TORCH_CHECK(call.ids()[b] >= 0 && call.ids()[b] < kMaxImageId,
                    "group_mask: image id ", call.ids()[b],
                    " is not in [0, 2**48); number images from 0");
  }
  const auto some = [&](int64_t begin, int64_t end) {
    group_mask_cpu(call.ids() + begin, end - begin, seed, epoch, call.law, call.block(begin),
                          call.cell(begin));
  };
  torch::stable::parallel_for(0, call.count(), 16, some);
  return {call.blocks, call.mask};
}

// --- views ----------------------------------------------------------------------------------

PixelType pixel_type(ScalarType type) {
  if (type == ScalarType::Byte) return PixelType::kUInt8;
  if (type == ScalarType::UInt16) return PixelType::kUInt16;
  STD_TORCH_CHECK(type == ScalarType::Float, "images: give uint8, uint16 or float32");
  return PixelType::kFloat32;
}

Views views_of(const Tensor& pixels, const MaybeTensor& boxes, const MaybeTensor& flip,
                      const Tensor& scale, const Tensor& shift, const std::vector<int64_t>& size,
                      int64_t patch) {
  STD_TORCH_CHECK(pixels.dim() == 4 && size.size() == 2, "images: give [B, C, H, W] and two sides");
  const int64_t count = pixels.size(0);
  expect(scale, "scale", ScalarType::Float, {count}, pixels);
  expect(shift, "shift", ScalarType::Float, {count}, pixels);
  if (boxes) expect(*boxes, "boxes", ScalarType::Float, {count, 4}, pixels);
  if (flip) expect(*flip, "flip", ScalarType::Bool, {count}, pixels);
  STD_TORCH_CHECK(pixels.stride(3) == 1 || pixels.size(3) == 1 || count == 0,
                  "images: the pixels of a row must lie side by side");
  const Views views{pixels.data_ptr(),
                           pixel_type(pixels.scalar_type()),
                           pixels.stride(0),
                           pixels.stride(1),
                           pixels.stride(2),
                           count,
                           int32_of(pixels.size(1)),
                           int32_of(pixels.size(2)),
                           int32_of(pixels.size(3)),
                           int32_of(size[0]),
                           int32_of(size[1]),
                           int32_of(patch),
                           data<float>(boxes),
                           data<bool>(flip),
                           data<float>(scale),
                           data<float>(shift)};
  check(refuse_sizes(views));
  expect_cpu_isa(cpu_isa());
  if (!pixels.is_cuda()) check(refuse_boxes(views));  // a GPU's kernels stay inside anyway
  return views;
}

// The side of a cell of the mask in pixels: 1 or the patch's.
int32_t unit_of(const Views& views, const Tensor& mask, const Tensor& pixels) {
  STD_TORCH_CHECK(mask.dim() == 3, "mask: give [B, h, w] or [B, Gh, Gw]");
  const int32_t unit = mask_unit(views, mask.size(1), mask.size(2));
  STD_TORCH_CHECK(unit != 0, kMaskRefused);
  expect(mask, "mask", ScalarType::Bool,
         {views.count, views.out_h / unit, views.out_w / unit}, pixels);
  return unit;
}

struct FillTensors {
  MaybeTensor mask, kind, partner, blocks, sources, image_ids;
};

Fill fill_of(const Views& views, const FillTensors& t, int64_t seed, int64_t epoch,
                    int64_t view, const Tensor& pixels) {
  Fill fill{};
  if (!t.mask) return fill;
  STD_TORCH_CHECK(t.kind && t.partner && t.blocks && t.sources && t.image_ids,
                  "masked_patch_gather: a mask needs kind, partner, blocks, sources, image ids");
  expect(*t.kind, "kind", ScalarType::Int, {views.count}, pixels);
  expect(*t.partner, "partner", ScalarType::Long, {views.count}, pixels);
  expect(*t.image_ids, "image ids", ScalarType::Long, {views.count}, pixels);
  STD_TORCH_CHECK(t.blocks->dim() == 3, "blocks: give [B, K, 4]");
  const int64_t blocks = t.blocks->size(1);
  expect(*t.blocks, "blocks", ScalarType::Int, {views.count, blocks, 4}, pixels);
  expect(*t.sources, "sources", ScalarType::Int, {views.count, blocks, 2}, pixels);
  STD_TORCH_CHECK(view >= 0 && view < 256, "view: 0 to 255");
  fill = Fill{data<bool>(t.mask),
                     unit_of(views, *t.mask, pixels),
                     data<int32_t>(t.kind),
                     data<int64_t>(t.partner),
                     data<int32_t>(t.blocks),
                     data<int32_t>(t.sources),
                     int32_of(blocks),
                     data<int64_t>(t.image_ids),
                     seed,
                     epoch,
                     static_cast<uint32_t>(view)};
  check(refuse_noise(seed, epoch));
  if (!pixels.is_cuda()) check(refuse_fill(views, fill));
  return fill;
}

Tensor masked_patch_gather_on_cpu(Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale,
                                  Tensor shift, std::vector<int64_t> size, int64_t patch,
                                  MaybeTensor mask, MaybeTensor kind, MaybeTensor partner,
                                  MaybeTensor blocks, MaybeTensor sources, MaybeTensor image_ids,
                                  int64_t seed, int64_t epoch, int64_t view, ScalarType dtype) {
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  const auto fill = fill_of(views, {mask, kind, partner, blocks, sources, image_ids}, seed, epoch,
                            view, pixels);
  const auto type = token_type(dtype);
  Tensor tokens = torch::stable::new_empty(
      pixels, {views.count, views.patches(), views.row_length()}, dtype);
  torch::stable::parallel_for(0, views.count, 1, [&](int64_t begin, int64_t end) {
    masked_patch_gather_cpu(views, fill, begin, end, tokens.data_ptr(), type);
  });
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor> visible_patch_gather_on_cpu(
    Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale, Tensor shift,
    std::vector<int64_t> size, int64_t patch, Tensor mask, int64_t rows, ScalarType dtype) {
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  check(spcxr::refuse_packed(views));
  expect(mask, "mask", ScalarType::Bool, {views.count, views.grid_h(), views.grid_w()}, pixels);
  const auto type = token_type(dtype);
  Tensor starts = torch::stable::new_empty(pixels, {views.count + 1}, ScalarType::Int);
  const auto* cu_seqlens = data<int32_t>(starts);
  count_visible_cpu(data<bool>(mask), views.count, views.patches(),
                           static_cast<int32_t*>(starts.data_ptr()));
  const int64_t visible = cu_seqlens[views.count];
  STD_TORCH_CHECK(rows >= visible, "visible_patch_gather: ", visible, " patches are visible, ",
                  rows, " rows were asked for");
  Tensor tokens = torch::stable::new_empty(pixels, {rows, views.row_length()}, dtype);
  Tensor ids = torch::stable::new_empty(pixels, {rows}, ScalarType::Int);
  auto* token_bytes = static_cast<char*>(tokens.data_ptr());
  auto* id = static_cast<int32_t*>(ids.data_ptr());
  torch::stable::parallel_for(0, views.count, 1, [&](int64_t begin, int64_t end) {
    visible_patch_gather_cpu(views, data<bool>(mask), cu_seqlens, begin, end, token_bytes,
                                    type, id);
  });
  const int64_t row_bytes = views.row_length() * element_size(dtype);
  std::memset(token_bytes + visible * row_bytes, 0, size_t((rows - visible) * row_bytes));
  std::fill(id + visible, id + rows, -1);
  return {tokens, ids, starts};
}

// What a loss call is made of, on either device.
struct LossCall {
  Views views;
  int32_t unit;
  TokenType type;
  LossLaw law;
  Tensor rows, slope, loss, weight;

  void* slopes() const { return slope.numel() == 0 ? nullptr : slope.data_ptr(); }
};

LossCall prepare(const Tensor& predicted, const Views& views, const Tensor& mask,
                 const Tensor& pixels, bool squared, bool normalise_patches, bool needs_gradient) {
  const Tensor rows = torch::stable::contiguous(predicted);
  const std::vector<int64_t> shape{views.count, views.patches(), views.row_length()};
  expect(rows, "predictions", predicted.scalar_type(), shape, pixels);
  return {views,
          unit_of(views, mask, pixels),
          token_type(predicted.scalar_type()),
          {squared ? Distance::kMSE : Distance::kL1, normalise_patches},
          rows,
          torch::stable::new_empty(rows, needs_gradient ? shape : std::vector<int64_t>{0},
                                   squared ? ScalarType::Float : ScalarType::Char),
          torch::stable::new_empty(pixels, {}, ScalarType::Float),
          torch::stable::new_empty(pixels, {}, ScalarType::Float)};
}

std::tuple<Tensor, Tensor, Tensor> masked_reconstruction_loss_on_cpu(
    Tensor predicted, Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale,
    Tensor shift, std::vector<int64_t> size, int64_t patch, Tensor mask, bool squared,
    bool normalise_patches, bool needs_gradient) {
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  const auto call =
      prepare(predicted, views, mask, pixels, squared, normalise_patches, needs_gradient);
  std::vector<double> sums(static_cast<size_t>(views.count));
  std::vector<int64_t> counts(sums.size());
  torch::stable::parallel_for(0, views.count, 1, [&](int64_t begin, int64_t end) {
    masked_reconstruction_loss_cpu(views, data<bool>(mask), call.unit, call.rows.data_ptr(),
                                   call.type, call.law, begin, end, sums.data(), counts.data(),
                                   call.slopes());
  });
  const int64_t hidden = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const double share = 1 / static_cast<double>(std::max<int64_t>(hidden, 1));
  *static_cast<float*>(call.loss.data_ptr()) =
      static_cast<float>(std::accumulate(sums.begin(), sums.end(), 0.0) * share);
  *static_cast<float*>(call.weight.data_ptr()) =
      static_cast<float>(slope_weight(call.law.distance) * share);
  return {call.loss, call.slope, call.weight};
}

// The gradient to be, of the slopes' shape, and whether those are signs.
struct GradientCall {
  Tensor slope, gradient;
  bool signs;
  TokenType type;
};

GradientCall prepare(const Tensor& slope, const Tensor& factor, ScalarType dtype) {
  expect(factor, "factor", ScalarType::Float, {}, slope);
  const bool signs = slope.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(signs || slope.scalar_type() == ScalarType::Float,
                  "reconstruction_gradient: slopes are int8 or float32");
  const Tensor rows = torch::stable::contiguous(slope);
  std::vector<int64_t> shape(static_cast<size_t>(rows.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = rows.size(static_cast<int64_t>(i));
  return {rows, torch::stable::new_empty(rows, shape, dtype), signs, token_type(dtype)};
}

Tensor reconstruction_gradient_on_cpu(Tensor slope, Tensor factor, ScalarType dtype) {
  const auto call = prepare(slope, factor, dtype);
  const int64_t count = call.slope.numel(), step = 1 << 15;
  torch::stable::parallel_for(0, (count + step - 1) / step, 1, [&](int64_t begin, int64_t end) {
    reconstruction_gradient_cpu(call.slope.data_ptr(), call.signs, *data<float>(factor), count,
                                begin * step, std::min(end * step, count),
                                call.gradient.data_ptr(), call.type);
  });
  return call.gradient;
}

}  // namespace

#define SPCXR_VIEWS \
  "Tensor pixels, Tensor? boxes, Tensor? flip, Tensor scale, Tensor shift, int[] size, int patch, "

STABLE_TORCH_LIBRARY(spcxr, m) {
  m.def(
      "group_mask(Tensor image_ids, SymInt seed, SymInt epoch, int[] grid, int[] target, "
      "int[] sides, bool torus, int max_blocks) -> (Tensor blocks, Tensor mask)");
  m.def(
      "masked_patch_gather(" SPCXR_VIEWS
      "Tensor? mask, Tensor? kind, Tensor? partner, Tensor? blocks, Tensor? sources, "
      "Tensor? image_ids, SymInt seed, SymInt epoch, int view, ScalarType dtype) -> Tensor");
  m.def("visible_patch_gather(" SPCXR_VIEWS
        "Tensor mask, SymInt rows, ScalarType dtype) -> (Tensor tokens, Tensor ids, "
        "Tensor cu_seqlens)");
  m.def("masked_reconstruction_loss(Tensor predicted, " SPCXR_VIEWS
        "Tensor mask, bool squared, bool normalise_patches, bool needs_gradient) -> "
        "(Tensor loss, Tensor slope, Tensor weight)");
  m.def("reconstruction_gradient(Tensor slope, Tensor factor, ScalarType dtype) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spcxr, CPU, m) {
  m.impl("group_mask", TORCH_BOX(&group_mask_on_cpu));
  m.impl("masked_patch_gather", TORCH_BOX(&masked_patch_gather_on_cpu));
  m.impl("visible_patch_gather", TORCH_BOX(&visible_patch_gather_on_cpu));
  m.impl("masked_reconstruction_loss", TORCH_BOX(&masked_reconstruction_loss_on_cpu));
  m.impl("reconstruction_gradient", TORCH_BOX(&reconstruction_gradient_on_cpu));
}

#ifdef SPCXR_CUDA
namespace {

std::tuple<Tensor, Tensor> group_mask_on_cuda(Tensor image_ids, int64_t seed, int64_t epoch,
                                              std::vector<int64_t> grid,
                                              std::vector<int64_t> target,
                                              std::vector<int64_t> sides, bool torus,
                                              int64_t max_blocks) {
  const torch::stable::accelerator::DeviceGuard guard(image_ids.get_device_index());
  const auto call = prepare(image_ids, seed, epoch, grid, target, sides, torus, max_blocks);
  const char* error =
      group_mask_cuda(call.ids(), call.count(), seed, epoch, call.law, call.block(0),
                             call.cell(0), current_stream(image_ids));
  STD_TORCH_CHECK(error == nullptr, "group_mask: ", error);
  return {call.blocks, call.mask};
}

Tensor masked_patch_gather_on_cuda(Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale,
                                   Tensor shift, std::vector<int64_t> size, int64_t patch,
                                   MaybeTensor mask, MaybeTensor kind, MaybeTensor partner,
                                   MaybeTensor blocks, MaybeTensor sources, MaybeTensor image_ids,
                                   int64_t seed, int64_t epoch, int64_t view, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  const auto fill = fill_of(views, {mask, kind, partner, blocks, sources, image_ids}, seed, epoch,
                            view, pixels);
  Tensor tokens = torch::stable::new_empty(
      pixels, {views.count, views.patches(), views.row_length()}, dtype);
  check(masked_patch_gather_cuda(views, fill, tokens.data_ptr(), token_type(dtype),
                                        current_stream(pixels)));
  return tokens;
}

std::tuple<Tensor, Tensor, Tensor> visible_patch_gather_on_cuda(
    Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale, Tensor shift,
    std::vector<int64_t> size, int64_t patch, Tensor mask, int64_t rows, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  check(spcxr::refuse_packed(views));
  expect(mask, "mask", ScalarType::Bool, {views.count, views.grid_h(), views.grid_w()}, pixels);
  Tensor starts = torch::stable::new_empty(pixels, {views.count + 1}, ScalarType::Int);
  Tensor tokens = torch::stable::new_empty(pixels, {rows, views.row_length()}, dtype);
  Tensor ids = torch::stable::new_empty(pixels, {rows}, ScalarType::Int);
  check(visible_patch_gather_cuda(
      views, data<bool>(mask), rows, tokens.data_ptr(), token_type(dtype),
      static_cast<int32_t*>(ids.data_ptr()), static_cast<int32_t*>(starts.data_ptr()),
      current_stream(pixels)));
  return {tokens, ids, starts};
}

std::tuple<Tensor, Tensor, Tensor> masked_reconstruction_loss_on_cuda(
    Tensor predicted, Tensor pixels, MaybeTensor boxes, MaybeTensor flip, Tensor scale,
    Tensor shift, std::vector<int64_t> size, int64_t patch, Tensor mask, bool squared,
    bool normalise_patches, bool needs_gradient) {
  const torch::stable::accelerator::DeviceGuard guard(pixels.get_device_index());
  const auto views = views_of(pixels, boxes, flip, scale, shift, size, patch);
  const auto call =
      prepare(predicted, views, mask, pixels, squared, normalise_patches, needs_gradient);
  Tensor scratch = torch::stable::new_empty(pixels, {2 * views.count}, ScalarType::Double);
  check(masked_reconstruction_loss_cuda(
      views, data<bool>(mask), call.unit, call.rows.data_ptr(), call.type, call.law,
      static_cast<double*>(scratch.data_ptr()), static_cast<float*>(call.loss.data_ptr()),
      static_cast<float*>(call.weight.data_ptr()), call.slopes(), current_stream(pixels)));
  return {call.loss, call.slope, call.weight};
}

Tensor reconstruction_gradient_on_cuda(Tensor slope, Tensor factor, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(slope.get_device_index());
  const auto call = prepare(slope, factor, dtype);
  check(reconstruction_gradient_cuda(call.slope.data_ptr(), call.signs, data<float>(factor),
                                     call.slope.numel(), call.gradient.data_ptr(), call.type,
                                     current_stream(slope)));
  return call.gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spcxr, CUDA, m) {
  m.impl("group_mask", TORCH_BOX(&group_mask_on_cuda));
  m.impl("masked_patch_gather", TORCH_BOX(&masked_patch_gather_on_cuda));
  m.impl("visible_patch_gather", TORCH_BOX(&visible_patch_gather_on_cuda));
  m.impl("masked_reconstruction_loss", TORCH_BOX(&masked_reconstruction_loss_on_cuda));
  m.impl("reconstruction_gradient", TORCH_BOX(&reconstruction_gradient_on_cuda));
}
#endif
