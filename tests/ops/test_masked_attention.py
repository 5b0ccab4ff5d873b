"""Masked attention: against float64, against torch's SDPA, under torch.compile, on bad input."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import CASES, PADDING, Call, relative_error
from torch.utils.flop_counter import FlopCounterMode
from view_cases import needs_native

import spcxr.ops.masked_attention as module
from spcxr.errors import SpcxrError
from spcxr.ops import dispatch
from spcxr.ops.masked_attention import handed_over, masked_attention, pack_key_mask

# Largest error over the largest value: rounding of inputs that are exact in each dtype.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(BOUNDS)


def serves(backend):
    reason = dispatch.unavailable("masked_attention", backend, "cpu")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_formula(name, dtype, backend):
    check(Call(name, dtype), backend, BOUNDS[dtype])


def check(call, backend, bound):
    out, gradients = call.truth()
    made = call(backend)
    assert (made.dtype, made.shape) == (call.qkv.dtype, out.shape)
    assert relative_error(made, out) <= bound
    for mine, wanted in zip(call.gradients(made), gradients, strict=True):
        assert mine.dtype == call.qkv.dtype
        assert relative_error(mine, wanted) <= bound


def hidden_rows(call):
    """Keys that are masked, of the packed rows or of [B, N]."""
    if call.cu_seqlens is None:
        return call.key_mask
    rows = [call.key_mask[b, :n] for b, n in enumerate(call.lengths)]
    return torch.cat([*rows, torch.zeros(PADDING, dtype=torch.bool)])


@pytest.mark.parametrize("name", ["masked", "packed, masked, biased", "apart"])
def test_whatever_masked_keys_hold_changes_nothing(name, backend):
    call = Call(name)
    out = call(backend)
    gradients = call.gradients(out)
    hidden = hidden_rows(call)
    assert hidden.any()
    poisoned = call.qkv.detach().clone()
    keys = poisoned.unbind(-3)[1:]
    keys[0][hidden], keys[1][hidden] = torch.nan, torch.inf
    call.qkv = poisoned.requires_grad_()
    again = call(backend)
    assert torch.equal(again, out)
    for mine, wanted in zip(call.gradients(again), gradients, strict=True):
        assert torch.equal(mine, wanted)
    assert not gradients[0].unbind(-3)[1][hidden].any()


@pytest.mark.parametrize("name", ["masked", "packed, masked, biased"])
def test_without_keys_output_and_gradients_are_zero(name, backend):
    call = Call(name)
    call.key_mask = torch.ones_like(call.key_mask)
    out = call(backend)
    assert not out.any()
    assert not any(g.any() for g in call.gradients(out))


def test_padding_of_a_packed_batch_is_zero(backend):
    call = Call("packed")
    call.qkv.data[-PADDING:] = torch.nan
    out = call(backend)
    assert not out[-PADDING:].any()
    assert not call.gradients(out)[0][-PADDING:].any()


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_written_in_full(name):
    """Torch fills fresh memory with NaN here: what is left of it shows."""
    serves("native")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        call = Call(name)
        out = call("native")
        values = [out, *call.gradients(out)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in values)


def sdpa(qkv, key_mask=None):
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    mask = None if key_mask is None else ~key_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def contents(kind, n, draw):
    """[2, n, 3, 2, 64]: what rounds well, and what rounds badly."""
    normal = torch.randn(2, n, 3, 2, 64, generator=draw)
    if kind == "large":
        normal[:, :, :2] *= 100 / normal[:, :, :2].abs().max()  # logits in the hundreds
    elif kind == "up to 100":
        normal[:, :, :2] = (200 * torch.rand(2, n, 2, 2, 64, generator=draw) - 100).round()
    elif kind == "constant":
        normal[:] = 0.7
    elif kind == "cancelling":
        normal[:, 1::2, 2] = -normal[:, 0 : n - n % 2 : 2, 2]  # values of pairs of keys sum to 0
        normal[:, :, 1] *= 1e-3
    elif kind == "one key stands out":
        normal[:, 0, 1] *= 50
    return normal


KINDS = ("random", "large", "up to 100", "constant", "cancelling", "one key stands out")


@pytest.mark.parametrize("hidden", [0.25, 0.75])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 50, 64, 197, 257])
def test_no_less_exact_than_sdpa(n, dtype, kind, hidden):
    """Errors in the output and in each gradient, over those of SDPA in the same dtype."""
    serves("native")
    draw = torch.Generator().manual_seed(n)
    qkv = contents(kind, n, draw).to(dtype)
    upstream = torch.randn(2, n, 128, generator=draw).to(dtype)
    key_mask = torch.rand(2, n, generator=draw) < (hidden if n > 3 else 0)

    def run(attention, inputs, gradient):
        inputs = inputs.detach().requires_grad_()
        out = attention(inputs)
        return [out, *torch.autograd.grad(out, inputs, gradient)[0].unbind(2)]

    truth = run(lambda x: sdpa(x, key_mask), qkv.double(), upstream.double())
    mine = run(lambda x: masked_attention(x, key_mask=key_mask, backend="native"), qkv, upstream)
    theirs = run(lambda x: sdpa(x, key_mask), qkv, upstream)
    # Rounding the result costs this much, and no kernel can be asked for less; where a gradient
    # cancels, rounding what it is made of: dq and dk of constant inputs are 0.
    unit, smallest = torch.finfo(dtype).eps / 4, upstream.double().norm() / 10
    smallest = smallest * (40 if kind == "constant" else 1)
    for name, t, m, s in zip(("out", "dq", "dk", "dv"), truth, mine, theirs, strict=True):
        error, allowed = ((x.double() - t).norm() for x in (m, s))
        floor = unit * torch.maximum(t.norm(), smallest)
        assert error <= 1.5 * allowed + floor, f"{name}: {error:.3g}, SDPA {allowed:.3g}"


def test_it_is_deterministic_for_any_number_of_threads():
    serves("native")
    call, threads = Call("packed, masked, biased", torch.bfloat16), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            out = call("native")
            found.append([out, *call.gradients(out)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("name", ["masked", "packed, masked, biased", "apart", "no token"])
def test_opcheck(name):
    call = Call(name)
    bits = None if call.key_mask is None else pack_key_mask(call.key_mask)
    sequences = (call.bias, bits, call.cu_seqlens, call.n_max, 0.3)
    torch.library.opcheck(torch.ops.spcxr.masked_attention, (call.qkv, *sequences, True))
    parts = tuple(t.detach().clone().requires_grad_() for t in call.qkv.unbind(-3))
    torch.library.opcheck(torch.ops.spcxr.masked_attention_split, (*parts, *sequences, True))


@needs_native
@pytest.mark.parametrize("name", ["masked", "packed, masked, biased", "apart"])
def test_compiles_whole_and_once_for_every_batch(name):
    """No graph break, no recompilation when the batch grows; gradients too."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda qkv, bias, mask, starts, most: masked_attention(
            qkv, bias=bias, key_mask=mask, cu_seqlens=starts, n_max=most, backend="native"
        ),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in (2, 5):
            call = Call(name, more=more)
            most = None if call.cu_seqlens is None else call.n_max
            out = compiled(call.qkv, call.bias, call.key_mask, call.cu_seqlens, most)
            eager = call("native")
            assert torch.equal(out, eager)
            for a, b in zip(call.gradients(out), call.gradients(eager), strict=True):
                assert torch.equal(a, b)


@needs_native
def test_exports_with_a_dynamic_batch():
    class Attend(torch.nn.Module):
        def forward(self, qkv, mask):
            return masked_attention(qkv, key_mask=mask, backend="native")

    batch = torch.export.Dim("batch")
    qkv, mask = torch.randn(3, 50, 3, 2, 64), torch.rand(3, 50) < 0.5
    program = torch.export.export(
        Attend(), (qkv, mask), dynamic_shapes={"qkv": {0: batch}, "mask": {0: batch}}
    )
    assert "spcxr.masked_attention" in str(program.graph)
    qkv, mask = torch.randn(7, 50, 3, 2, 64), torch.rand(7, 50) < 0.5
    assert torch.equal(program.module()(qkv, mask), masked_attention(qkv, key_mask=mask))


@needs_native
def test_lse_is_kept_for_a_gradient_alone(monkeypatch):
    seen = []
    op = torch.ops.spcxr.masked_attention
    monkeypatch.setattr(
        torch.ops.spcxr, "masked_attention", lambda *a: seen.append(a[-1]) or op(*a)
    )
    qkv = torch.randn(1, 5, 3, 1, 64)
    masked_attention(qkv)
    masked_attention(qkv.requires_grad_())
    with torch.no_grad():
        masked_attention(qkv)
    assert seen == [False, True, False]
    assert op(qkv, None, None, None, 5, 1.0, False)[1].numel() == 0


def test_autocast_casts_as_for_a_matrix_product(backend):
    qkv = torch.randn(2, 9, 3, 2, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(qkv, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, masked_attention(qkv.bfloat16(), backend=backend))


@needs_native
def test_flops_are_counted():
    """4 d a pair of tokens and head forward, 10 d backward; of a packed batch those there are."""
    for name in ("ViT at 224", "packed", "apart"):
        call = Call(name)
        with FlopCounterMode(display=False) as counter:
            out = call("native")
        heads, dim = call.qkv.shape[-2:]
        pairs = sum(n * n for n in call.lengths) * heads
        assert counter.get_total_flops() == 4 * dim * pairs
        with FlopCounterMode(display=False) as counter:
            out.backward(call.upstream)
        assert counter.get_total_flops() == 10 * dim * pairs


def test_strides_do_not_matter(backend):
    draw = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 3, 2, 64, generator=draw)
    wanted = masked_attention(qkv, backend=backend)
    heads_first = qkv.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    dims_first = qkv.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    sliced = torch.zeros(4, 18, 3, 2, 80)[::2, ::2, ..., 8:72].copy_(qkv)
    for other in (heads_first, dims_first, sliced):
        assert not other.is_contiguous()
        assert torch.equal(masked_attention(other, backend=backend), wanted)


def test_the_mask_of_many_layers_is_packed_once(backend):
    call = Call("masked")
    assert torch.equal(call(backend, key_mask=pack_key_mask(call.key_mask)), call(backend))


BITS = torch.zeros(2, 1, dtype=torch.int32)


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (lambda t: ((t, t.bfloat16(), t), {}), r"float32.*give one of"),
        (lambda t: ((t, t[:, :3], t), {}), r"give \[B, N, h, d\]"),
        (lambda t: (t, {}), r"give \[B, N, 3, h, d\]"),
        (lambda t: (t.long()[:, :, None].expand(2, 5, 3, 2, 64), {}), "float32, bfloat16"),
        (lambda t: ((), {}), "0 tensors; give qkv"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 5), "n_max": 5.5}), "needs n_max"),
        (lambda t: (torch.zeros(2, 5, 3, 1, 0), {}), "head dim 0 is not served"),
        (lambda t: ((t, t, t), {"n_max": 5}), "cu_seqlens"),
        (lambda t: ((t, t, t), {"key_mask": torch.zeros(2, 4) > 0}), r"give \[2, 5\] bool"),
        (lambda t: ((t, t, t), {"key_mask": BITS[:1]}), r"\[2, 1\] int32"),
        (lambda t: ((t, t, t), {"key_mask": BITS.long()}), r"give \[2, 5\] bool"),
        (lambda t: ((t, t, t), {"bias": torch.zeros(3, 2, 32)}), r"give \[3, 2, 64\]"),
        (lambda t: ((t, t, t), {"bias": torch.zeros(384).half()}), "give torch.float32"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 5)}), "needs n_max"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 6), "n_max": 6}), "at most the 5 rows"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 4, 3), "n_max": 5}), "must rise"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(1, 4), "n_max": 5}), "must rise from 0"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 4), "n_max": 3}), "has 4 tokens, n_max"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(), "n_max": 3}), r"give \[B \+ 1\] int32"),
        (lambda t: ((t[0],) * 3, {"cu_seqlens": starts(0, 5).long(), "n_max": 5}), "int32"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, said, backend):
    qkv, sequences = words(torch.zeros(2, 5, 2, 64))
    with pytest.raises(SpcxrError, match=said) as caught:
        masked_attention(qkv, backend=backend, **sequences)
    assert "\n" not in str(caught.value)


@needs_native
def test_the_op_itself_keeps_memory_safe():
    """What Python refuses with kind words, the op refuses too."""
    op, qkv = torch.ops.spcxr.masked_attention, torch.zeros(5, 3, 2, 64)
    for cu_seqlens in (starts(0, 6), starts(0, 4, 3), starts(-1, 4)):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            op(qkv, None, None, cu_seqlens, 5, 1.0, False)
    with pytest.raises(RuntimeError, match="key bits"):
        op(qkv[None], None, BITS[:, :0], None, 5, 1.0, False)
    with pytest.raises(RuntimeError, match="n_max"):
        op(qkv[None], None, None, None, 6, 1.0, False)


def test_what_the_kernels_do_not_serve_goes_to_sdpa(monkeypatch):
    gpu, half = torch.device("cuda"), torch.bfloat16
    # Bytes a block of an RTX 3090, an A100 and an H100 may have.
    for shared, most in ((101376, 192), (166912, 256), (232448, 256)):
        monkeypatch.setattr(module, "_shared_bytes", lambda device, shared=shared: shared)
        assert handed_over("native", gpu, half, 64, most) is None
        assert handed_over("native", gpu, half, 64, most + 1) is not None
    monkeypatch.setattr(module, "_shared_bytes", lambda device: 232448)
    for words in ((torch.float32, 64, 50), (half, 24, 50), (half, 128, 256)):
        assert handed_over("native", gpu, *words) is not None
    wide = torch.randn(2, 9, 3, 1, 300)
    assert torch.allclose(masked_attention(wide), sdpa(wide), atol=1e-6)
    qkv = torch.randn(2, 9, 3, 2, 8, dtype=torch.float64)
    assert torch.allclose(masked_attention(qkv), sdpa(qkv))
    with pytest.raises(dispatch.BackendUnavailable, match="does not serve float64"):
        masked_attention(qkv, backend="native")


def test_double_backward_is_refused(backend):
    """Also beside a path that has a second derivative, where torch would only warn."""
    if backend == "reference":
        pytest.skip("torch's own attention has its own rules")
    qkv = torch.randn(1, 5, 3, 1, 64, requires_grad=True)
    loss = masked_attention(qkv, backend=backend).square().sum()
    (gradient,) = torch.autograd.grad(loss, qkv, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), qkv, retain_graph=True)
    with pytest.raises(RuntimeError):
        (loss + gradient.square().sum()).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n != "odd heads"])
@pytest.mark.parametrize("name_of_backend", ["native", "triton"])
def test_on_a_gpu(name_of_backend, name, dtype):
    """Against float64; nothing waits for the device."""
    call = Call(name, dtype, "cuda")
    check(call, name_of_backend, BOUNDS[dtype])
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.gradients(call(name_of_backend))
    finally:
        torch.cuda.set_sync_debug_mode("default")
