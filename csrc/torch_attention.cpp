// torch.ops.spcxr.masked_attention*: schemas and bindings. Fakes, autograd and the friendly checks
// are in Python (spcxr/ops/masked_attention.py); what keeps memory safe is checked here too.
#include <cstring>
#include <tuple>

#include "core/attention.h"
#include "torch_calls.h"

namespace {

using namespace spcxr;

// q, k, v: [B, N, h, d], or [T, h, d] with cu_seqlens, any strides whose last is 1.
struct Inputs {
  Tensor q, k, v;
  MaybeTensor bias, key_bits, cu_seqlens;
  int64_t n_max;
  double scale;

  bool packed() const { return cu_seqlens.has_value(); }
  std::vector<int64_t> rows() const {
    return packed() ? std::vector<int64_t>{q.size(0)}
                    : std::vector<int64_t>{q.size(0), q.size(1)};
  }
  std::vector<int64_t> shape(std::initializer_list<int64_t> rest) const {
    auto sizes = rows();
    sizes.insert(sizes.end(), rest);
    return sizes;
  }
  int64_t heads() const { return q.size(q.dim() - 2); }
  int64_t dim() const { return q.size(q.dim() - 1); }
};

Tensor part(const Tensor& qkv, int64_t which) {
  STD_TORCH_CHECK(qkv.dim() == 4 || qkv.dim() == 5, "qkv: give [B, N, 3, h, d] or [T, 3, h, d]");
  const int64_t three = qkv.dim() - 3;
  STD_TORCH_CHECK(qkv.size(three) == 3, "qkv: give [B, N, 3, h, d] or [T, 3, h, d]");
  return torch::stable::select(qkv, three, which);
}

Strides strides(const Tensor& t) {
  const int64_t token = t.dim() - 3;
  return {token == 0 ? 0 : t.stride(0), t.stride(token), t.stride(token + 1)};
}

// The tokens of the longest sequence.
int32_t expect_sequences(const int32_t* cu_seqlens, int64_t count, int64_t total, int64_t n_max) {
  int64_t longest = 0;
  STD_TORCH_CHECK(cu_seqlens[0] == 0, "cu_seqlens: begins with ", cu_seqlens[0], ", not with 0");
  for (int64_t b = 0; b < count; ++b) {
    const int64_t length = int64_t{cu_seqlens[b + 1]} - cu_seqlens[b];
    STD_TORCH_CHECK(length >= 0 && length <= n_max, "cu_seqlens: sequence ", b, " has ", length,
                    " tokens; they must be 0 to n_max ", n_max);
    longest = length > longest ? length : longest;
  }
  STD_TORCH_CHECK(cu_seqlens[count] <= total, "cu_seqlens: ends at ", cu_seqlens[count], ", past ",
                  total, " rows");
  return static_cast<int32_t>(longest);
}

Attention attention_of(const Inputs& in) {
  STD_TORCH_CHECK(in.q.dim() == (in.packed() ? 3 : 4),
                  "q, k, v: give [B, N, h, d], or [T, h, d] with cu_seqlens");
  for (const Tensor* t : {&in.q, &in.k, &in.v}) {
    bool fits = t->dim() == in.q.dim() && t->scalar_type() == in.q.scalar_type() &&
                t->is_cuda() == in.q.is_cuda() && t->get_device() == in.q.get_device();
    for (int64_t i = 0; fits && i < t->dim(); ++i) fits = t->size(i) == in.q.size(i);
    STD_TORCH_CHECK(fits, "q, k, v: give one dtype, shape and device");
    STD_TORCH_CHECK(t->stride(t->dim() - 1) == 1 || in.dim() == 1,
                    "q, k, v: the elements of a head must lie side by side");
  }
  const int64_t count = in.packed() ? in.cu_seqlens->size(0) - 1 : in.q.size(0);
  const int64_t total = in.packed() ? in.q.size(0) : count * in.q.size(1);
  STD_TORCH_CHECK(count >= 0, "cu_seqlens: give [B + 1]");
  STD_TORCH_CHECK(total <= INT32_MAX, "more than 2**31 - 1 tokens in one call");
  STD_TORCH_CHECK(in.packed() || in.n_max == in.q.size(1), "n_max: not the number of tokens");
  Attention a{};
  a.type = token_type(in.q.scalar_type());
  a.q = in.q.data_ptr(), a.k = in.k.data_ptr(), a.v = in.v.data_ptr();
  a.q_strides = strides(in.q), a.k_strides = strides(in.k), a.v_strides = strides(in.v);
  a.count = count, a.total = total, a.n_max = int32_of(in.n_max);
  a.heads = int32_of(in.heads()), a.dim = int32_of(in.dim());
  a.scale = static_cast<float>(in.scale);
  STD_TORCH_CHECK(a.dim >= 1 && a.dim <= 256, "head dim ", a.dim, " is not served; give 1 to 256");
  if (in.bias) {
    expect(*in.bias, "bias", in.q.scalar_type(), {3, in.heads(), in.dim()}, in.q);
    a.bias = in.bias->data_ptr();
  }
  if (in.key_bits) {
    expect(*in.key_bits, "key bits", ScalarType::Int, {count, a.key_words()}, in.q);
    a.key_bits = data<uint32_t>(in.key_bits);
  }
  if (in.packed()) {
    expect(*in.cu_seqlens, "cu_seqlens", ScalarType::Int, {count + 1}, in.q);
    a.cu_seqlens = data<int32_t>(in.cu_seqlens);
    if (!in.q.is_cuda()) {
      const int32_t longest = expect_sequences(a.cu_seqlens, count, total, in.n_max);
      // Scratch is by n_max, which may be any bound; a row of key bits has its words, though.
      if (a.key_bits == nullptr) a.n_max = longest;
    }
  }
  return a;
}

struct Outputs {
  Tensor out, lse;

  Outputs(const Inputs& in, const Attention& a, bool need_lse)
      : out(torch::stable::new_empty(in.q, in.shape({in.heads() * in.dim()}))),
        lse(torch::stable::new_empty(
            in.q, need_lse ? std::vector<int64_t>{a.heads, a.total} : std::vector<int64_t>{0},
            ScalarType::Float)) {}
};

// Contiguous, and on CUDA from a multiple of 16 bytes on.
Tensor in_pieces(const Tensor& t) {
  const Tensor made = torch::stable::contiguous(t);
  const bool odd = reinterpret_cast<uintptr_t>(made.data_ptr()) % 16 != 0;
  return made.is_cuda() && odd ? torch::stable::clone(made) : made;
}

// dq, dk and dv are parts of one tensor [.., 3, h, d]: a fused qkv needs no copy.
struct Gradient {
  Tensor grad_out, dqkv;
  AttentionGradient g;

  Gradient(const Inputs& in, const Attention& a, const Tensor& upstream, const Tensor& out,
           const Tensor& lse)
      : grad_out(in_pieces(upstream)),
        dqkv(torch::stable::new_empty(in.q, in.shape({3, in.heads(), in.dim()}))),
        g{} {
    const auto like_out = in.shape({in.heads() * in.dim()});
    expect(grad_out, "gradient of the output", in.q.scalar_type(), like_out, in.q);
    expect(out, "output", in.q.scalar_type(), like_out, in.q);
    expect(lse, "lse", ScalarType::Float, {a.heads, a.total}, in.q);
    g.out = out.data_ptr(), g.grad_out = grad_out.data_ptr(), g.lse = data<float>(lse);
    const Tensor dq = part(dqkv, 0), dk = part(dqkv, 1), dv = part(dqkv, 2);
    g.dq = dq.data_ptr(), g.dk = dk.data_ptr(), g.dv = dv.data_ptr();
    g.dq_strides = g.dk_strides = g.dv_strides = strides(dq);
  }
};

// --- the two ways to give q, k and v ---------------------------------------------------------

using Forward = std::tuple<Tensor, Tensor>(const Inputs& in, bool need_lse);

template <Forward forward>
std::tuple<Tensor, Tensor> split(Tensor q, Tensor k, Tensor v, MaybeTensor bias,
                                 MaybeTensor key_bits, MaybeTensor cu_seqlens, int64_t n_max,
                                 double scale, bool need_lse) {
  return forward({q, k, v, bias, key_bits, cu_seqlens, n_max, scale}, need_lse);
}

template <Forward forward>
std::tuple<Tensor, Tensor> fused(Tensor qkv, MaybeTensor bias, MaybeTensor key_bits,
                                 MaybeTensor cu_seqlens, int64_t n_max, double scale,
                                 bool need_lse) {
  return split<forward>(part(qkv, 0), part(qkv, 1), part(qkv, 2), bias, key_bits, cu_seqlens, n_max,
                        scale, need_lse);
}

// --- CPU ------------------------------------------------------------------------------------

// Rows of a packed batch that belong to no sequence.
void clear_rest(const Attention& a, const Tensor& t, int64_t row_elements) {
  if (a.cu_seqlens == nullptr) return;
  const int64_t row_bytes = row_elements * element_size(t.scalar_type());
  const int64_t used = a.cu_seqlens[a.count];
  std::memset(static_cast<char*>(t.data_ptr()) + used * row_bytes, 0,
              static_cast<size_t>((a.total - used) * row_bytes));
}

std::tuple<Tensor, Tensor> forward_on_cpu(const Inputs& in, bool need_lse) {
  const Attention a = attention_of(in);
  expect_cpu_isa(attention_isa(a.type, a.dim));
  const Outputs made(in, a, need_lse);
  float* const lse = need_lse ? static_cast<float*>(made.lse.data_ptr()) : nullptr;
  torch::stable::parallel_for(0, a.count * a.heads, 1, [&](int64_t begin, int64_t end) {
    masked_attention_cpu(a, begin, end, made.out.data_ptr(), lse);
  });
  clear_rest(a, made.out, int64_t{a.heads} * a.dim);
  if (need_lse && a.cu_seqlens != nullptr) {
    for (int32_t h = 0; h < a.heads; ++h) {
      std::memset(lse + h * a.total + a.cu_seqlens[a.count], 0,
                  static_cast<size_t>(a.total - a.cu_seqlens[a.count]) * sizeof(float));
    }
  }
  return {made.out, made.lse};
}

Tensor backward_on_cpu(Tensor grad_out, Tensor q, Tensor k, Tensor v, MaybeTensor bias,
                       MaybeTensor key_bits, MaybeTensor cu_seqlens, int64_t n_max, double scale,
                       Tensor out, Tensor lse) {
  const Inputs in{q, k, v, bias, key_bits, cu_seqlens, n_max, scale};
  const Attention a = attention_of(in);
  expect_cpu_isa(attention_isa(a.type, a.dim));
  const Gradient gradient(in, a, grad_out, out, lse);
  torch::stable::parallel_for(0, a.count * a.heads, 1, [&](int64_t begin, int64_t end) {
    masked_attention_backward_cpu(a, gradient.g, begin, end);
  });
  clear_rest(a, gradient.dqkv, 3 * int64_t{a.heads} * a.dim);
  return gradient.dqkv;
}

}  // namespace

#define SPCXR_SEQUENCES \
  "Tensor? bias, Tensor? key_bits, Tensor? cu_seqlens, SymInt n_max, float scale, "

STABLE_TORCH_LIBRARY_FRAGMENT(spcxr, m) {
  m.def("masked_attention(Tensor qkv, " SPCXR_SEQUENCES "bool need_lse) -> (Tensor out, Tensor lse)");
  m.def("masked_attention_split(Tensor q, Tensor k, Tensor v, " SPCXR_SEQUENCES
        "bool need_lse) -> (Tensor out, Tensor lse)");
  m.def("masked_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, " SPCXR_SEQUENCES
        "Tensor out, Tensor lse) -> Tensor dqkv");
}

STABLE_TORCH_LIBRARY_IMPL(spcxr, CPU, m) {
  m.impl("masked_attention", TORCH_BOX(&fused<forward_on_cpu>));
  m.impl("masked_attention_split", TORCH_BOX(&split<forward_on_cpu>));
  m.impl("masked_attention_backward", TORCH_BOX(&backward_on_cpu));
}

#ifdef SPCXR_CUDA
namespace {

std::tuple<Tensor, Tensor> forward_on_cuda(const Inputs& in, bool need_lse) {
  const torch::stable::accelerator::DeviceGuard guard(in.q.get_device_index());
  const Attention a = attention_of(in);
  const Outputs made(in, a, need_lse);
  check(masked_attention_cuda(a, made.out.data_ptr(),
                              need_lse ? static_cast<float*>(made.lse.data_ptr()) : nullptr,
                              current_stream(in.q)));
  return {made.out, made.lse};
}

Tensor backward_on_cuda(Tensor grad_out, Tensor q, Tensor k, Tensor v, MaybeTensor bias,
                        MaybeTensor key_bits, MaybeTensor cu_seqlens, int64_t n_max, double scale,
                        Tensor out, Tensor lse) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs in{q, k, v, bias, key_bits, cu_seqlens, n_max, scale};
  const Attention a = attention_of(in);
  const Gradient gradient(in, a, grad_out, out, lse);
  check(masked_attention_backward_cuda(a, gradient.g, current_stream(q)));
  return gradient.dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(spcxr, CUDA, m) {
  m.impl("masked_attention", TORCH_BOX(&fused<forward_on_cuda>));
  m.impl("masked_attention_split", TORCH_BOX(&split<forward_on_cuda>));
  m.impl("masked_attention_backward", TORCH_BOX(&backward_on_cuda));
}
#endif
