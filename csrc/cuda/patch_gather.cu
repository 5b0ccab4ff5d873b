#include "cuda/patch_gather.cuh"

#include "cuda/launch.cuh"

namespace spcxr {

const char* masked_patch_gather_cuda(const Views& views, const Fill& fill, void* tokens,
                                     TokenType type, void* cuda_stream) {
  if (const char* reason = refuse(views, fill.mask == nullptr ? 1 : fill.unit)) return reason;
  if (reinterpret_cast<uintptr_t>(fill.blocks) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(fill.sources) % 8 != 0) {
    return "the lists of blocks and sources do not start at a multiple of 16 bytes";
  }
  const bool eight = wide(views, tokens);
  const Layout layout = eight ? make_layout(views, 8, kDeep) : make_layout(views, 1, 1);
  const int32_t blocks_an_image = ceil_div(layout.pieces, kGatherThreads * (eight ? 1 : 4));
  const int64_t blocks = views.count * blocks_an_image;
  if (blocks > INT32_MAX) return "the batch is too large for one launch";
  if (blocks == 0) return nullptr;
  const Divisor an_image = make_divisor(blocks_an_image);
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  with_token(type, [&](auto token) {
    using Token = decltype(token);
    Token* out = static_cast<Token*>(tokens);
    const auto grid = static_cast<unsigned>(blocks);
    if (!eight) {
      gather_narrow_kernel<Token>
          <<<grid, kGatherThreads, 0, stream>>>(views, fill, layout, an_image, out);
      return;
    }
    with_pixel(views.pixel_type, [&](auto pixel) {
      using Pixel = decltype(pixel);
      const auto kernel = whole_images(views) ? gather_wide_kernel<Pixel, Token, true>
                                              : gather_wide_kernel<Pixel, Token, false>;
      kernel<<<grid, kGatherThreads, 0, stream>>>(views, fill, layout, an_image, out);
    });
  });
  return launch_error();
}

}  // namespace spcxr
