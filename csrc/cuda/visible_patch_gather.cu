#include "cuda/visible_patch_gather.cuh"

#include "cuda/launch.cuh"

namespace spcxr {

const char* visible_patch_gather_cuda(const Views& views, const bool* mask, int64_t rows,
                                      void* tokens, TokenType type, int32_t* ids,
                                      int32_t* cu_seqlens, void* cuda_stream) {
  if (const char* reason = refuse(views, views.patch)) return reason;
  if (views.count * views.patches() > INT32_MAX) return "a batch of 2**31 patches or more";
  if (rows < 0 || rows > INT32_MAX) return "rows must be in [0, 2**31)";
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto images = static_cast<unsigned>(views.count);
  if (images != 0) {
    count_visible_kernel<<<images, kListThreads, 0, stream>>>(mask, views.patches(), cu_seqlens);
  }
  scan_kernel<<<1, kListThreads, 0, stream>>>(views.count, cu_seqlens);
  if (rows == 0) return launch_error();
  if (images != 0) {
    list_visible_kernel<<<images, kListThreads, 0, stream>>>(mask, views.patches(), cu_seqlens,
                                                             rows, ids);
  }
  const bool eight = wide(views, tokens);
  const Layout layout = eight ? make_layout(views, 8, kDeep) : make_layout(views, 1, 1);
  const auto threads_a_row = static_cast<int32_t>(layout.row.by);
  const int32_t rows_a_block =
      threads_a_row < kVisibleThreads ? kVisibleThreads / threads_a_row : 1;
  const auto grid = static_cast<unsigned>(ceil_div(rows, rows_a_block));
  with_token(type, [&](auto token) {
    using Token = decltype(token);
    const Packed<Token> out{cu_seqlens, rows, static_cast<Token*>(tokens), ids};
    if (!eight) {
      visible_narrow_kernel<Token>
          <<<grid, kVisibleThreads, 0, stream>>>(views, layout, rows_a_block, out);
      return;
    }
    with_pixel(views.pixel_type, [&](auto pixel) {
      using Pixel = decltype(pixel);
      const auto kernel = whole_images(views) ? visible_wide_kernel<Pixel, Token, true>
                                              : visible_wide_kernel<Pixel, Token, false>;
      kernel<<<grid, kVisibleThreads, 0, stream>>>(views, layout, rows_a_block, out);
    });
  });
  return launch_error();
}

}  // namespace spcxr
