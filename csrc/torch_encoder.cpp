// torch.ops.spcxr.norm_linear and residual_mlp: schemas and bindings. Fakes and the friendly checks
// are in Python (spcxr/ops/encoder_layers.py); what keeps memory safe is checked here too.
#include "core/encoder.h"
#include "torch_calls.h"

namespace {

using namespace spcxr;

// Fewer rows are not worth a thread.
constexpr int64_t kLeastRows = 16;

std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> sizes(size_t(t.dim()));
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = t.size(int64_t(i));
  return sizes;
}

// Rows of bfloat16 [.., wide].
struct TokenRows {
  int64_t count, wide;

  TokenRows(const Tensor& t, const char* name) : count(1), wide(t.dim() > 0 ? t.size(-1) : 0) {
    STD_TORCH_CHECK(t.dim() > 0 && !t.is_cuda(), name, ": give rows [.., D] on the CPU");
    expect(t, name, ScalarType::BFloat16, shape_of(t), t);
    for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  }
};

Linear linear_of(const Tensor& weight, const Tensor& bias, int64_t in, const Tensor& tokens) {
  STD_TORCH_CHECK(weight.dim() == 5 && in % 32 == 0, "weight: give [out/16, in/32, 16, 16, 2]");
  const int64_t out = weight.size(0) * 16;
  STD_TORCH_CHECK(out % 32 == 0, "weight: ", out, " columns; give a multiple of 32");
  expect(weight, "weight", ScalarType::BFloat16, {out / 16, in / 32, 16, 16, 2}, tokens);
  expect(bias, "bias", ScalarType::BFloat16, {out}, tokens);
  return {data<uint16_t>(weight), data<uint16_t>(bias), int32_of(in), int32_of(out)};
}

Norm norm_of(const Tensor& weight, const Tensor& bias, double eps, int64_t wide,
             const Tensor& tokens) {
  expect(weight, "norm weight", ScalarType::BFloat16, {wide}, tokens);
  expect(bias, "norm bias", ScalarType::BFloat16, {wide}, tokens);
  return {data<uint16_t>(weight), data<uint16_t>(bias), static_cast<float>(eps)};
}

void expect_products() {
  STD_TORCH_CHECK(encoder_isa() != nullptr,
                  "this CPU, this build or SPCXR_CPU_ISA has no products of bfloat16");
}

Tensor norm_linear_on_cpu(Tensor tokens, Tensor norm_weight, Tensor norm_bias, double eps,
                          Tensor weight, Tensor bias) {
  expect_products();
  const TokenRows rows(tokens, "tokens");
  const Norm norm = norm_of(norm_weight, norm_bias, eps, rows.wide, tokens);
  const Linear linear = linear_of(weight, bias, rows.wide, tokens);
  auto sizes = shape_of(tokens);
  sizes.back() = linear.out;
  const Tensor out = torch::stable::new_empty(tokens, sizes);
  auto* const to = static_cast<uint16_t*>(out.data_ptr());
  torch::stable::parallel_for(0, rows.count, kLeastRows, [&](int64_t begin, int64_t end) {
    norm_linear_cpu(norm, linear, data<uint16_t>(tokens), begin, end, to);
  });
  return out;
}

Tensor residual_mlp_on_cpu(Tensor tokens, Tensor attended, Tensor proj_weight, Tensor proj_bias,
                           Tensor norm_weight, Tensor norm_bias, double eps, Tensor fc1_weight,
                           Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias) {
  expect_products();
  const TokenRows rows(tokens, "tokens");
  expect(attended, "attended", ScalarType::BFloat16, shape_of(tokens), tokens);
  const BlockEnd layers{linear_of(proj_weight, proj_bias, rows.wide, tokens),
                        norm_of(norm_weight, norm_bias, eps, rows.wide, tokens),
                        linear_of(fc1_weight, fc1_bias, rows.wide, tokens),
                        linear_of(fc2_weight, fc2_bias, fc1_bias.size(0), tokens)};
  STD_TORCH_CHECK(layers.proj.out == rows.wide && layers.fc2.out == rows.wide,
                  "residual_mlp: the branches have other widths than the tokens");
  const Tensor out = torch::stable::new_empty(tokens, shape_of(tokens));
  auto* const to = static_cast<uint16_t*>(out.data_ptr());
  torch::stable::parallel_for(0, rows.count, kLeastRows, [&](int64_t begin, int64_t end) {
    residual_mlp_cpu(layers, data<uint16_t>(tokens), data<uint16_t>(attended), begin, end, to);
  });
  return out;
}

}  // namespace

// For spcxr/ops/dispatch.py, by ctypes: the instruction set that serves these two, or null.
extern "C" __attribute__((visibility("default"))) const char* spcxr_encoder_isa() {
  return spcxr::encoder_isa();
}

STABLE_TORCH_LIBRARY_FRAGMENT(spcxr, m) {
  m.def(
      "norm_linear(Tensor tokens, Tensor norm_weight, Tensor norm_bias, float eps, Tensor weight, "
      "Tensor bias) -> Tensor");
  m.def(
      "residual_mlp(Tensor tokens, Tensor attended, Tensor proj_weight, Tensor proj_bias, "
      "Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor fc1_bias, "
      "Tensor fc2_weight, Tensor fc2_bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(spcxr, CPU, m) {
  m.impl("norm_linear", TORCH_BOX(&norm_linear_on_cpu));
  m.impl("residual_mlp", TORCH_BOX(&residual_mlp_on_cpu));
}
