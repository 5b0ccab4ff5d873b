#include "cuda/reconstruction_loss.cuh"

#include "cuda/launch.cuh"

namespace spcxr {

const char* masked_reconstruction_loss_cuda(const Views& views, const bool* mask, int32_t unit,
                                            const void* predicted, TokenType type,
                                            const LossLaw& law, double* scratch, float* loss,
                                            float* weight, void* slope, void* cuda_stream) {
  if (const char* reason = refuse(views, unit)) return reason;
  if (views.count > INT32_MAX) return "the batch is too large for one launch";
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto images = static_cast<unsigned>(views.count);
  double* sums = scratch;
  double* counts = scratch + views.count;
  if (images != 0) {
    const int64_t cells = int64_t{views.out_h / unit} * (views.out_w / unit);
    const double elements = double{1} * unit * unit * views.channels;
    count_hidden_kernel<<<images, kCountThreads, 0, stream>>>(mask, cells, elements, counts);

    const bool eight = wide(views, predicted) && wide(views, slope);
    const Layout layout = make_layout(views, eight ? 8 : 1, 1);
    int32_t lanes = 1;
    while (lanes < static_cast<int32_t>(layout.row.by) && lanes < 32) lanes *= 2;
    Fill hidden{};
    hidden.mask = mask;
    hidden.unit = unit;
    with_token(type, [&](auto token) {
      using Token = decltype(token);
      const LossCall<Token> call{hidden, law,  lanes, static_cast<const Token*>(predicted),
                                 slope, sums, counts};
      if (!eight) {
        loss_kernel<One, Token><<<images, kLossThreads, 0, stream>>>(views, layout, call);
        return;
      }
      with_pixel(views.pixel_type, [&](auto pixel) {
        using Pixel = decltype(pixel);
        const auto kernel = whole_images(views) ? loss_kernel<Eight<Pixel, true>, Token>
                                                : loss_kernel<Eight<Pixel, false>, Token>;
        kernel<<<images, kLossThreads, 0, stream>>>(views, layout, call);
      });
    });
  }
  mean_loss_kernel<<<1, kCountThreads, 0, stream>>>(sums, counts, views.count,
                                                    slope_weight(law.distance), loss, weight);
  return launch_error();
}

const char* reconstruction_gradient_cuda(const void* slope, bool signs, const float* factor,
                                         int64_t count, void* gradient, TokenType type,
                                         void* cuda_stream) {
  if (count == 0) return nullptr;
  const int64_t blocks = (count + 8 * kGradientThreads - 1) / (8 * kGradientThreads);
  if (blocks > INT32_MAX) return "the batch is too large for one launch";
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const bool wide = aligned_16(slope) && aligned_16(gradient);
  with_token(type, [&](auto token) {
    using Token = decltype(token);
    const auto launch = [&](auto* from) {
      gradient_kernel<<<static_cast<unsigned>(blocks), kGradientThreads, 0, stream>>>(
          from, factor, count, wide, static_cast<Token*>(gradient));
    };
    signs ? launch(static_cast<const int8_t*>(slope)) : launch(static_cast<const float*>(slope));
  });
  return launch_error();
}

}  // namespace spcxr
