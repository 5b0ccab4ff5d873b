// numpy entry for loader workers that do not import torch. No torch headers here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "core/group_mask.h"

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
    need(ids[b] >= 0 && ids[b] < spcxr::kMaxImageId, "an image id is not in [0, 2**48)");
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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ kernels on numpy arrays; the GIL is released while they run.";
  m.def("group_mask", &group_mask,
        "Groups of a batch as numpy arrays: blocks (B, K, 4) int32 and mask (B, Gh, Gw) bool.\n\n"
        "As spcxr.ops.group_mask.group_mask, bit for bit; ValueError for parameters out of range.",
        py::arg("image_ids").noconvert(), py::kw_only(), py::arg("seed"), py::arg("epoch"),
        py::arg("grid"), py::arg("ratio") = Pair{0.5, 0.75}, py::arg("block") = py::none(),
        py::arg("placement") = "uniform");
}
