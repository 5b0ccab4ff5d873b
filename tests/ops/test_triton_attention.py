"""The Triton twin of masked attention in Triton's interpreter, against the formulas in float64.

In a subprocess: the interpreter is chosen when triton is imported. bfloat16 is left to a GPU: the
interpreter multiplies its bits.
"""

import os
import subprocess
import sys

import pytest

BEGIN = """
import torch
from spcxr.kernels.masked_attention import masked_attention, masked_attention_backward

FLOAT, HALF, NAN, INF = torch.float32, torch.float16, float("nan"), float("inf")
PARTS = ("out", "dq", "dk", "dv", "lse")
STEP = {FLOAT: 4e-6, HALF: 2**-9}  # of the largest value
torch.use_deterministic_algorithms(True)  # what is not written stays NaN

def words_of(mask):  # True = masked
    wide = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 32))
    bits = wide.view(len(mask), -1, 32).long() << torch.arange(32)
    return bits.sum(-1).to(torch.int32)  # the upper bit becomes the sign

class Call:
    # Sequences of `lengths` tokens, `rest` rows past them; what must not be read is NaN.
    def __init__(self, lengths, heads, dim, dtype, mask=None, bias=False, packed=False, rest=0,
                 size=1.0, seed=0):
        torch.manual_seed(seed)
        self.lengths, self.packed, self.mask = lengths, packed, mask
        self.heads, self.dim, self.scale = heads, dim, dim**-0.5
        self.used, self.total = sum(lengths), sum(lengths) + rest
        self.n_max = max(lengths, default=0)
        drawn = torch.randn(self.total, 3, heads, dim)
        drawn[:, :2] *= size
        drawn[self.used:] = NAN
        at = 0
        for b, length in enumerate(lengths):
            if mask is not None:
                drawn[at:at + length, 1:][mask[b, :length]] = NAN
            at += length
        self.qkv = drawn.to(dtype)
        self.bias = torch.randn(3, heads, dim).to(dtype) if bias else None
        self.grad_out = torch.randn(self.total, heads * dim).to(dtype)
        self.grad_out[self.used:] = NAN

    def laid(self, t):
        return t if self.packed else t.view(len(self.lengths), self.n_max, *t.shape[1:])

    def views(self):
        return self.laid(self.qkv).unbind(-3)

    def run(self, *views):
        starts = torch.tensor([0, *self.lengths]).cumsum(0).int() if self.packed else None
        bits = None if self.mask is None else words_of(self.mask)
        views = views or self.views()
        words = (*views, self.bias, bits, starts, self.n_max, self.scale)
        out, lse = masked_attention(*words, True)
        made = masked_attention_backward(self.laid(self.grad_out), *words, out, lse).unbind(-3)
        assert made[0].untyped_storage().data_ptr() == made[2].untyped_storage().data_ptr()
        assert all(a.shape == b.shape for a, b in zip(made, views, strict=True))
        assert out.dtype == made[0].dtype == self.qkv.dtype and lse.dtype == FLOAT
        folded = [t.reshape(self.total, self.heads, self.dim) for t in (out, *made)]
        return [*folded, lse]

    def truth(self):
        qkv = self.qkv.double() + (0 if self.bias is None else self.bias.double())
        do = self.grad_out.double().view(self.total, self.heads, self.dim)
        out, dq, dk, dv = torch.zeros(4, self.total, self.heads, self.dim, dtype=torch.float64)
        lse = torch.full((self.heads, self.total), INF, dtype=torch.float64)
        at = 0
        for b, length in enumerate(self.lengths):
            there = torch.arange(at, at + length)
            keys = there if self.mask is None else there[~self.mask[b, :length]]
            for h in range(self.heads if len(keys) else 0):
                q, k, v = qkv[there, 0, h], qkv[keys, 1, h], qkv[keys, 2, h]
                s = self.scale * q @ k.T
                p = s.softmax(1)
                lse[h, there] = s.logsumexp(1)
                out[there, h] = p @ v
                dp = do[there, h] @ v.T
                ds = self.scale * p * (dp - (p * dp).sum(1, keepdim=True))
                dq[there, h], dk[keys, h], dv[keys, h] = ds @ k, ds.T @ q, p.T @ do[there, h]
            at += length
        return [out, dq, dk, dv, lse]

    def holds(self, step=None):
        made, step = self.run(), step or STEP[self.qkv.dtype]
        for what, a, wanted in zip(PARTS, made, self.truth(), strict=True):
            endless = wanted == INF
            assert torch.equal(a == INF, endless), what
            away = (a.double() - wanted)[~endless].abs()
            if away.numel():
                limit = step * max(wanted[~endless].abs().max(), 1)
                assert away.max() <= limit, (what, away.max(), limit)
            if what != "lse":
                assert (a[self.used:] == 0).all(), what
        return made

def masks(count, n, seed=0):
    # Of the first nothing is masked, of the second everything, then shares.
    shares = torch.tensor([0, 1.1, 0.25, 0.5, 0.75])[:count, None]
    return torch.rand(count, n, generator=torch.Generator().manual_seed(seed)) < shares
"""

SCRIPTS = {
    "dense": """
Call([1], 1, 16, FLOAT).holds()
Call([5, 5], 2, 32, HALF, bias=True).holds()
Call([70], 1, 16, HALF).holds()
Call([40], 1, 64, FLOAT, bias=True).holds()
Call([33], 1, 128, HALF, bias=True).holds()
Call([17, 17], 1, 128, FLOAT).holds()
# Large and constant.
Call([20], 1, 64, HALF, size=10).holds()
for dtype in (FLOAT, HALF):
    call = Call([20], 1, 64, dtype, size=100)
    call.holds(step=0.02)  # logits of 1e5 have an error of 0.01 themselves
    call.qkv.fill_(100)  # so have differences of gradients of 1e4
    call.holds(step=0.02)
    call.qkv[::2, :2] = -100
    call.holds(step=0.02)
""",
    "masked and packed": """
for n, heads, dim, dtype, bias in ((1, 2, 16, FLOAT, True), (33, 1, 32, HALF, False),
                                   (40, 1, 16, FLOAT, True), (70, 1, 64, HALF, True)):
    call = Call([n] * 3, heads, dim, dtype, mask=masks(3, n), bias=bias)
    out, dq, dk, dv, lse = call.holds()
    hidden = call.mask.flatten()
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all()
    assert all((t[n:2 * n] == 0).all() for t in (out, dq)) and (lse[:, n:2 * n] == INF).all()
# Whole blocks of keys are masked, the first or the last.
late = torch.arange(100)[None] >= 6
Call([100] * 2, 1, 16, HALF, mask=torch.cat([late, late.flip(1)])).holds()
for lengths, heads, dim, dtype, mask, bias, rest in (
    ([40, 3, 0, 17], 1, 16, FLOAT, None, False, 0),
    ([70, 3, 0, 33, 1], 2, 32, HALF, None, True, 7),
    ([20, 3, 20, 0, 5], 2, 16, FLOAT, masks(5, 20), True, 7),
):
    Call(lengths, heads, dim, dtype, mask, bias, packed=True, rest=rest).holds()
""",
    "empty, repeated, strides": """
Call([], 2, 16, FLOAT).holds()
Call([0, 0], 2, 16, HALF, mask=masks(2, 0), bias=True).holds()
Call([], 2, 16, FLOAT, packed=True).holds()
Call([], 2, 16, FLOAT, packed=True, rest=3).holds()
Call([0, 0], 2, 16, HALF, packed=True, rest=300).holds()

def same(made, wanted):
    return all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))

call = Call([17, 17], 2, 16, FLOAT, mask=masks(2, 17), bias=True)
wanted = call.run()
assert same(call.run(), wanted)
words = (call.bias, words_of(call.mask), None, 17, call.scale)
alone, nothing = masked_attention(*call.views(), *words, False)
assert torch.equal(alone.view_as(wanted[0]), wanted[0]) and nothing.shape == (0,)
apart = [torch.full((3, 21, 5, 40), NAN) for _ in range(3)]
apart = [t[1:, 2 + i:19 + i, ::2][:, :, 1:, 8:24] for i, t in enumerate(apart)]
turned = [torch.full((2, 2, 17, 16), NAN).transpose(1, 2) for _ in range(3)]
for views in (apart, turned):
    for view, values in zip(views, call.views(), strict=True):
        view.copy_(values)
    assert same(call.run(*views), wanted)
call.grad_out = torch.ones(()).expand(34, 32)
spread = call.run()
call.grad_out = torch.ones(34, 32)
assert same(call.run(), spread)
# A sequence alone gives the bits that it gives among others; packed heads apart in memory.
many = Call([10, 20, 5], 2, 16, HALF, packed=True)
one = Call([20], 2, 16, HALF)
one.qkv, one.grad_out = many.qkv[10:30], many.grad_out[10:30]
assert same([t[10:30] for t in many.run()[:4]], one.run()[:4])
apart = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in many.views()]
assert same(many.run(*apart), many.run())
""",
    "autograd": """
from spcxr.ops.masked_attention import masked_attention as verb

torch.manual_seed(0)
qkv, bias = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.randn(3, 2, 16)
bias.requires_grad_()
mask, upstream = torch.rand(2, 9) < 0.3, torch.randn(2, 9, 32)
for inputs in ((qkv,), tuple(t.detach().requires_grad_() for t in qkv.unbind(2))):
    found = []
    for backend in ("triton", "reference"):
        out = verb(inputs if len(inputs) == 3 else qkv, bias=bias, key_mask=mask, backend=backend)
        found.append((out, *torch.autograd.grad(out, (*inputs, bias), upstream)))
    for mine, wanted in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
""",
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_equals_the_formulas(what):
    pytest.importorskip("triton", reason="triton is not installed")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + SCRIPTS[what] + "print('equal')"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.stdout.strip().endswith("equal"), run.stderr
