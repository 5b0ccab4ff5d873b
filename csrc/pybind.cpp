// numpy entry for loader workers that do not import torch. No torch headers here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/group_mask.h"
#include "core/patch_checks.h"
#include "core/patch_gather.h"

namespace py = pybind11;

namespace {

using Pair = std::pair<double, double>;

void need(bool held, const char* message) {
  if (!held) throw py::value_error(message);
}

spcxr::Law law_of(std::pair<int64_t, int64_t> grid, Pair ratio, std::optional<Pair> block,
                  const std::string& placement) {
  const auto side = [](int64_t s) { return s >= 1 && s <= spcxr::kMaxSide; };
  need(side(grid.first) && side(grid.second), "mask grid: give two sides of 1 to 4096 units");
  need(0 <= ratio.first && ratio.first <= ratio.second && ratio.second <= 1,
       "mask ratio: give 0 <= low <= high <= 1");
  need(!block || (1 <= block->first && block->first <= block->second && block->second <= 4096),
       "block sides: give 1 <= low <= high <= 4096 units");
  need(placement == "uniform" || placement == "corner", "placement: choose uniform or corner");
  const Pair sides = block.value_or(Pair{0, 0});
  const auto law = spcxr::make_law(static_cast<int32_t>(grid.first),
                                   static_cast<int32_t>(grid.second), ratio.first, ratio.second,
                                   sides.first, sides.second, placement == "uniform");
  const char* reason = spcxr::refuse(law);
  need(reason == nullptr, reason);
  return law;
}

py::tuple group_mask(const py::array_t<int64_t, py::array::c_style>& image_ids, int64_t seed,
                     int64_t epoch, std::pair<int64_t, int64_t> grid, Pair ratio,
                     std::optional<Pair> block, const std::string& placement) {
  need(image_ids.ndim() == 1, "image ids: give [B] int64");
  need(seed >= 0 && epoch >= 0 && epoch <= INT64_C(0xFFFFFFFF),
       "give 0 <= seed < 2**63, 0 <= epoch < 2**32");
  const spcxr::Law law = law_of(grid, ratio, block, placement);
  const int64_t count = image_ids.shape(0);
  const int64_t* ids = image_ids.data();
  for (int64_t b = 0; b < count; ++b) {
    need(ids[b] >= 0 && ids[b] < spcxr::kMaxImageId, "image ids: one is not in [0, 2**48); number images from 0");
  }
  py::array_t<int32_t> blocks({count, int64_t{law.max_blocks}, int64_t{4}});
  py::array_t<bool> mask({count, grid.first, grid.second});
  int32_t* const block_data = blocks.mutable_data();
  bool* const mask_data = mask.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    spcxr::group_mask_cpu(ids, count, seed, epoch, law, block_data, mask_data);
  }
  return py::make_tuple(blocks, mask);
}

// --- masked_patch_gather.

using Shape = std::vector<int64_t>;
using Given = std::optional<py::array>;

bool has_shape(const py::array& array, const Shape& shape) {
  if (array.ndim() != static_cast<py::ssize_t>(shape.size())) return false;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] >= 0 && array.shape(static_cast<py::ssize_t>(i)) != shape[i]) return false;
  }
  return true;
}

// A small array of the call, in one piece; -1 in a shape is any number. Kept until the call ends.
template <typename T>
py::array_t<T, py::array::c_style> small(const py::array& array, const Shape& shape,
                                         const char* message) {
  need(py::isinstance<py::array_t<T>>(array) && has_shape(array, shape), message);
  return py::array_t<T, py::array::c_style>::ensure(array);
}

template <typename T>
class Optional {
 public:
  Optional(const Given& given, const Shape& shape, const char* message) {
    if (given) held_ = small<T>(*given, shape, message);
  }
  const T* data() const { return held_ ? held_->data() : nullptr; }
  int64_t shape(int axis) const { return held_ ? held_->shape(axis) : 0; }

 private:
  std::optional<py::array_t<T, py::array::c_style>> held_;
};

spcxr::PixelType pixel_type_of(const py::array& images) {
  if (py::isinstance<py::array_t<uint8_t>>(images)) return spcxr::PixelType::kUInt8;
  if (py::isinstance<py::array_t<uint16_t>>(images)) return spcxr::PixelType::kUInt16;
  need(py::isinstance<py::array_t<float>>(images), "images: give uint8, uint16 or float32");
  return spcxr::PixelType::kFloat32;
}

// Everything of Views but boxes, flip, scale and shift. Follows the array's strides.
spcxr::Views views_of(const py::array& images, std::pair<int64_t, int64_t> size, int64_t patch) {
  spcxr::Views v{};
  v.pixel_type = pixel_type_of(images);
  need(images.ndim() == 4, "images: give [B, C, H, W]");
  for (int axis = 1; axis < 4; ++axis) {
    need(images.shape(axis) <= spcxr::kMaxViewSide, "images: sides must be 1 to 32768 pixels");
  }
  const auto side = [](int64_t s) { return s >= 1 && s <= spcxr::kMaxViewSide; };
  need(side(size.first) && side(size.second) && side(patch),
       "size, patch: give 1 to 32768 pixels");
  const int64_t item = images.itemsize();
  const bool empty = images.size() == 0;  // its strides say nothing
  for (int axis = 0; axis < 4; ++axis) {
    need(images.strides(axis) % item == 0 || images.shape(axis) <= 1 || empty,
         "images: strides must be whole pixels; call numpy.ascontiguousarray");
  }
  need(images.strides(3) == item || images.shape(3) <= 1 || empty,
       "images: the pixels of a row must be contiguous; call numpy.ascontiguousarray");
  need(reinterpret_cast<uintptr_t>(images.data()) % static_cast<uintptr_t>(item) == 0,
       "images: the memory is not aligned; call numpy.ascontiguousarray");
  v.pixels = images.data();
  v.image_stride = images.strides(0) / item;
  v.channel_stride = images.strides(1) / item;
  v.row_stride = images.strides(2) / item;
  v.count = images.shape(0);
  v.channels = static_cast<int32_t>(images.shape(1));
  v.source_h = static_cast<int32_t>(images.shape(2));
  v.source_w = static_cast<int32_t>(images.shape(3));
  v.out_h = static_cast<int32_t>(size.first);
  v.out_w = static_cast<int32_t>(size.second);
  v.patch = static_cast<int32_t>(patch);
  const char* const reason = spcxr::refuse_sizes(v);
  need(reason == nullptr, reason);
  return v;
}

// The views of a call with all that they point to.
struct Source {
  spcxr::Views views;
  Optional<float> scale, shift, boxes;
  Optional<bool> flip;

  Source(const py::array& images, std::pair<int64_t, int64_t> size, int64_t patch,
         const py::array& scale_given, const py::array& shift_given, const Given& boxes_given,
         const Given& flip_given)
      : views(views_of(images, size, patch)),
        scale(scale_given, {views.count}, "scale: give [B] float32"),
        shift(shift_given, {views.count}, "shift: give [B] float32"),
        boxes(boxes_given, {views.count, 4}, "boxes: give [B, 4] float32"),
        flip(flip_given, {views.count}, "flip: give [B] bool") {
    views.scale = scale.data();
    views.shift = shift.data();
    views.boxes = boxes.data();
    views.flip = flip.data();
    const char* const reason = spcxr::refuse_boxes(views);
    need(reason == nullptr, reason);
  }
};

spcxr::TokenType token_type_of(const std::string& name) {
  need(spcxr::cpu_isa() != nullptr,
       "SPCXR_CPU_ISA: this machine or this build lacks it; unset it, or name portable");
  if (name == "float32") return spcxr::TokenType::kFloat32;
  if (name == "float16") return spcxr::TokenType::kFloat16;
  need(name == "bfloat16", "dtype: choose float32, float16 or bfloat16 (as uint16 bits)");
  return spcxr::TokenType::kBFloat16;
}

py::array new_tokens(spcxr::TokenType type, const Shape& shape) {
  const char* const names[] = {"float32", "uint16", "float16"};  // numpy has no bfloat16
  return py::array(py::dtype(names[static_cast<int32_t>(type)]), shape);
}

py::array masked_patch_gather(const py::array& images, std::pair<int64_t, int64_t> size,
                              int64_t patch, const py::array& scale, const py::array& shift,
                              const Given& boxes, const Given& flip, const Given& mask_given,
                              const Given& kind_given, const Given& partner_given,
                              const Given& blocks_given, const Given& sources_given,
                              const Given& ids_given, int64_t seed, int64_t epoch, int64_t view,
                              const std::string& dtype) {
  const spcxr::TokenType type = token_type_of(dtype);
  const Source source(images, size, patch, scale, shift, boxes, flip);
  const spcxr::Views& v = source.views;
  const Optional<bool> mask(mask_given, {v.count, -1, -1}, "mask: give [B, h, w] bool");
  const Optional<int32_t> kind(kind_given, {v.count}, "kind: give [B] int32");
  const Optional<int64_t> partner(partner_given, {v.count}, "partner: give [B] int64");
  const Optional<int32_t> blocks(blocks_given, {v.count, -1, 4}, "blocks: give [B, K, 4] int32");
  const Optional<int32_t> sources(sources_given, {v.count, blocks.shape(1), 2},
                                  "sources: give [B, K, 2] int32");
  const Optional<int64_t> ids(ids_given, {v.count}, "image ids: give [B] int64");
  need(blocks.shape(1) <= INT32_MAX, "blocks: more than 2**31 an image; give fewer");
  need(view >= 0 && view < 256, "view: give 0 to 255");
  spcxr::Fill f{mask.data(), 1, kind.data(), partner.data(), blocks.data(), sources.data(),
                static_cast<int32_t>(blocks.shape(1)), ids.data(), seed, epoch,
                static_cast<uint32_t>(view)};
  if (mask_given) {
    f.unit = spcxr::mask_unit(v, mask.shape(1), mask.shape(2));
    need(f.unit != 0, spcxr::kMaskRefused);
  }
  for (const char* reason : {spcxr::refuse_noise(seed, epoch), spcxr::refuse_fill(v, f)}) {
    need(reason == nullptr, reason);
  }
  py::array tokens = new_tokens(type, {v.count, v.patches(), v.row_length()});
  void* const data = tokens.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    spcxr::masked_patch_gather_cpu(v, f, 0, v.count, data, type);
  }
  return tokens;
}

py::tuple visible_patch_gather(const py::array& images, const py::array& mask_given,
                               std::pair<int64_t, int64_t> size, int64_t patch,
                               const py::array& scale, const py::array& shift, const Given& boxes,
                               const Given& flip, const std::string& dtype) {
  const spcxr::TokenType type = token_type_of(dtype);
  const Source source(images, size, patch, scale, shift, boxes, flip);
  const spcxr::Views& v = source.views;
  const char* const reason = spcxr::refuse_packed(v);
  need(reason == nullptr, reason);
  const auto mask = small<bool>(mask_given, {v.count, v.grid_h(), v.grid_w()},
                                "mask: give [B, Gh, Gw] bool, one cell a patch");
  py::array_t<int32_t> starts(v.count + 1);
  int32_t* const start = starts.mutable_data();
  spcxr::count_visible_cpu(mask.data(), v.count, v.patches(), start);
  py::array tokens = new_tokens(type, {start[v.count], v.row_length()});
  py::array_t<int32_t> ids(start[v.count]);
  void* const data = tokens.mutable_data();
  int32_t* const id = ids.mutable_data();
  const bool* const hidden = mask.data();
  {
    const py::gil_scoped_release unlocked;
    spcxr::visible_patch_gather_cpu(v, hidden, start, 0, v.count, data, type, id);
  }
  return py::make_tuple(tokens, ids, starts);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ kernels on numpy arrays; the GIL is released while they run.";
  m.def("group_mask", &group_mask,
        "Groups of a batch as numpy arrays: blocks (B, K, 4) int32 and mask (B, Gh, Gw) bool.\n\n"
        "As spcxr.ops.group_mask.group_mask, bit for bit; ValueError for parameters out of range.",
        py::arg("image_ids").noconvert(), py::kw_only(), py::arg("seed"), py::arg("epoch"),
        py::arg("grid"), py::arg("ratio") = Pair{0.5, 0.75}, py::arg("block") = py::none(),
        py::arg("placement") = "uniform");
  m.def("masked_patch_gather", &masked_patch_gather,
        "Images (B, C, H, W) as tokens (B, N, C*P*P): boxes resampled to `size`, flipped, times\n"
        "`scale` plus `shift`, cut into patches, hidden pixels filled.\n\n"
        "images uint8, uint16 or float32, strides followed, rows contiguous; scale, shift (B,)\n"
        "float32; boxes (B, 4) float32: top, left, height, width; flip (B,) bool; mask (B, h, w)\n"
        "bool, True = hidden, a cell a patch or a pixel; kind (B,) int32: 0 noise (needs\n"
        "image_ids (B,) int64), 1 zeros, 2 other (partner (B,) int64), 3 shuffle (blocks\n"
        "(B, K, 4), sources (B, K, 2) int32). dtype: float32, float16 or bfloat16, the last as\n"
        "uint16 bits. As spcxr.ops.masked_patch_gather; ValueError for what cannot be served.",
        py::arg("images").noconvert(), py::kw_only(), py::arg("size"), py::arg("patch"),
        py::arg("scale"), py::arg("shift"), py::arg("boxes") = py::none(),
        py::arg("flip") = py::none(), py::arg("mask") = py::none(), py::arg("kind") = py::none(),
        py::arg("partner") = py::none(), py::arg("blocks") = py::none(),
        py::arg("sources") = py::none(), py::arg("image_ids") = py::none(), py::arg("seed") = 0,
        py::arg("epoch") = 0, py::arg("view") = 0, py::arg("dtype") = "float32");
  m.def("visible_patch_gather", &visible_patch_gather,
        "The visible patches alone, packed: tokens (T, C*P*P), ids (T,) int32: the patch's number\n"
        "in its image, and cu_seqlens (B + 1,) int32. mask (B, Gh, Gw) bool, True = hidden; the\n"
        "rest as in masked_patch_gather.",
        py::arg("images").noconvert(), py::kw_only(), py::arg("mask"), py::arg("size"),
        py::arg("patch"), py::arg("scale"), py::arg("shift"), py::arg("boxes") = py::none(),
        py::arg("flip") = py::none(), py::arg("dtype") = "float32");
  m.def("cpu_isa", &spcxr::cpu_isa,
        "The instruction set that serves: portable, avx2, avx512 or avx512_bf16.\n\n"
        "SPCXR_CPU_ISA asks for one; None when this machine or this build lacks it.");
}
