#include "cuda/reconstruction_loss.cuh"

#include "cuda/launch.cuh"

namespace spcxr {

const char* masked_reconstruction_loss_cuda(const Views& views, const bool* mask, int32_t unit,
                                            const void* predicted, TokenType type,
                                            const LossLaw& law, double* scratch, float* loss,
                                            void* gradient, void* cuda_stream) {
  if (const char* reason = refuse(views, unit)) return reason;
  if (views.count > INT32_MAX) return "the batch is too large for one launch";
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const auto images = static_cast<unsigned>(views.count);
  double* sums = scratch;
  double* counts = scratch + views.count;
  if (images != 0) {
    const int64_t cells = int64_t{views.out_h / unit} * (views.out_w / unit);
    const double weight = double{1} * unit * unit * views.channels;
    count_hidden_kernel<<<images, kCountThreads, 0, stream>>>(mask, cells, weight, counts);

    const bool eight = wide(views, predicted) && wide(views, gradient);
    const Layout layout = make_layout(views, eight ? 8 : 1, 1);
    int32_t lanes = 1;
    while (lanes < static_cast<int32_t>(layout.row.by) && lanes < 32) lanes *= 2;
    Fill hidden{};
    hidden.mask = mask;
    hidden.unit = unit;
    with_token(type, [&](auto token) {
      using Token = decltype(token);
      const LossCall<Token> call{hidden, law,  lanes, static_cast<const Token*>(predicted),
                                 static_cast<Token*>(gradient), sums, counts};
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
  sum_losses_kernel<<<1, kCountThreads, 0, stream>>>(sums, views.count, loss);
  return launch_error();
}

}  // namespace spcxr
